// Runs the blocks of a grid one after the other and the threads of a block as fibers: each runs
// until it waits for others or ends. A warp runs until its lanes all wait at a block barrier, so
// that a missing barrier shows.
//
// The kernels are compiled with -fsanitize=thread and -fsanitize=alignment but linked with neither
// runtime: the calls that the compiler puts at every memory access end here. Each is checked:
// within a buffer that the test named, aligned, not racing with another thread, and in shared
// memory not of a value that this block never wrote.
#include "cuda_emulation.h"

#include <link.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cuda_emulation {

Builtins builtins;

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = size_t(1) << 17;

enum class Order { kAscending = 0, kDescending = 1, kShuffled = 2 };
enum class State { kReady, kAtBlock, kAtWarp, kExited };

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  State state;
  uint3 index;
  // where it waits, and for what
  WarpOp op;
  uint32_t mask;
  uint64_t value, result;
  int source, line;
  const char* file;
};

// What is remembered of one byte. A block has a serial number of its own, over all launches. Epochs
// count the barriers that the block, and the syncs that the warp, has passed.
constexpr uint16_t kSeveralThreads = 0xffff, kSeveralWarps = 0xfffe, kSeveralBlocks = 0xfffd;
struct Access {
  uint32_t block = 0;
  uint16_t thread = 0;  // or one of the above
  uint16_t warp = 0;
  uint16_t block_epoch = 0, warp_epoch = 0;
};
struct Cell {
  Access write, read;
};

struct Buffer {
  uintptr_t begin, end;
  Cell* cells;
};

// --- state: one launch at a time

Fiber fibers[kMaxThreads];
bool fibers_are_fresh = false;  // at the start of their loop
char* stacks = nullptr;
int current = 0;
bool is_running = false, has_failed = false;
char message[1024];

Call kernel_call;
void* kernel_closure;
int num_threads = 0;
uint32_t block_serial = 0, first_block_of_launch = 0;
uint16_t block_epoch = 0, warp_epochs[kMaxThreads / kWarp];
uintptr_t host_low = 0, host_high = 0;  // the launcher's frame, which holds the arguments

std::vector<Buffer> buffers;
size_t last_buffer = 0;
// Those of the buffers, and used again: what is left of other launches counts for nothing.
std::vector<std::vector<Cell>> cells;
// The writable image of this module: shared memory, and nothing else that kernels use.
Buffer writable;
uintptr_t image_base = 0;
Order order = Order::kAscending;
uint64_t random_state = 1;
uint64_t counts[5];  // launches, blocks, barriers, warp operations, accesses
enum Count { kLaunches, kBlocks, kBarriers, kWarpOps, kAccesses };

// --- fibers

#ifdef __x86_64__
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* scheduler;
void to_fiber(Fiber& fiber) { cuda_emulation_switch(&scheduler, fiber.stack_pointer); }
void to_scheduler(Fiber& fiber) { cuda_emulation_switch(&fiber.stack_pointer, scheduler); }
#else
ucontext_t scheduler;
void to_fiber(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
void to_scheduler(Fiber& fiber) { swapcontext(&fiber.context, &scheduler); }
#endif

void fiber_loop() {
  for (;;) {
    Fiber& fiber = fibers[current];
    kernel_call(kernel_closure);
    fiber.state = State::kExited;
    to_scheduler(fiber);
  }
}

void make_fibers() {
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
  }
  for (int i = 0; i < kMaxThreads; ++i) {
    char* stack = stacks + i * kStackBytes;
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // where fiber_loop would return to
    *--top = reinterpret_cast<void*>(&fiber_loop);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fibers[i].stack_pointer = top;
#else
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stack;
    fibers[i].context.uc_stack.ss_size = kStackBytes;
    fibers[i].context.uc_link = nullptr;
    makecontext(&fibers[i].context, fiber_loop, 0);
#endif
  }
  fibers_are_fresh = true;
}

// --- errors. The first one counts; its fiber never goes on.

void describe(const char* format, va_list arguments) {
  if (has_failed) return;
  has_failed = true;
  const int length = std::vsnprintf(message, sizeof(message), format, arguments);
  if (length < 0 || size_t(length) >= sizeof(message)) return;
  std::snprintf(message + length, sizeof(message) - length, " [block (%u, %u, %u)]",
                builtins.block.x, builtins.block.y, builtins.block.z);
}

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(format, arguments);
  va_end(arguments);
}

// In a fiber.
__attribute__((format(printf, 1, 2))) void fail_here(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(format, arguments);
  va_end(arguments);
  to_scheduler(fibers[current]);
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// --- order

uint32_t draw(uint32_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t((random_state >> 16) % bound);
}

// 0 ... count - 1 in the order asked for.
std::vector<int64_t> ordered(int64_t count) {
  std::vector<int64_t> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) items[i] = order == Order::kDescending ? count - 1 - i : i;
  if (order == Order::kShuffled) {
    for (int64_t i = count - 1; i > 0; --i) std::swap(items[i], items[draw(uint32_t(i + 1))]);
  }
  return items;
}

// --- the scheduler

void run_fiber(int thread) {
  current = thread;
  builtins.thread = fibers[thread].index;
  to_fiber(fibers[thread]);
}

const char* name(State state) {
  switch (state) {
    case State::kExited:
      return "has ended";
    case State::kAtBlock:
      return "waits at a __syncthreads";
    default:
      return "waits elsewhere";
  }
}

// Lets the lanes go on that wait for each other.
void release_warp(int first, int lanes) {
  ++counts[kWarpOps];
  bool is_sync = false;
  for (int lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = fibers[first + lane];
    if (fiber.state != State::kAtWarp) continue;
    is_sync |= fiber.op == WarpOp::kSync;
    uint32_t votes = 0;
    for (int other = 0; other < kWarp; ++other) {
      if ((fiber.mask >> other & 1) == 0) continue;
      if (other >= lanes) {
        return fail("%s:%d: lane %d of the mask %08x is not in the block", base_name(fiber.file),
                    fiber.line, other, fiber.mask);
      }
      const Fiber& peer = fibers[first + other];
      if (peer.state != State::kAtWarp || peer.op != fiber.op || peer.mask != fiber.mask ||
          peer.line != fiber.line) {
        return fail("%s:%d: lane %d waits for lane %d of the mask %08x, which %s",
                    base_name(fiber.file), fiber.line, lane, other, fiber.mask, name(peer.state));
      }
      votes |= uint32_t(peer.value & 1) << other;
    }
    switch (fiber.op) {
      case WarpOp::kShuffle:
        if (fiber.source < 0 || fiber.source >= lanes || (fiber.mask >> fiber.source & 1) == 0) {
          return fail("%s:%d: lane %d reads lane %d, which is not in the mask %08x",
                      base_name(fiber.file), fiber.line, lane, fiber.source, fiber.mask);
        }
        fiber.result = fibers[first + fiber.source].value;
        break;
      case WarpOp::kSync:
        break;
      case WarpOp::kBallot:
        fiber.result = votes;
        break;
      case WarpOp::kAny:
        fiber.result = votes != 0;
        break;
      case WarpOp::kAll:
        fiber.result = votes == fiber.mask;
        break;
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = fibers[first + lane];
    if (fiber.state == State::kAtWarp) fiber.state = State::kReady;
  }
  if (is_sync) ++warp_epochs[first / kWarp];
}

// Until every lane has ended or waits for the block.
void run_warp(int first) {
  const int lanes = num_threads - first < kWarp ? num_threads - first : kWarp;
  for (;;) {
    bool waits = false;
    for (const int64_t lane : ordered(lanes)) {
      Fiber& fiber = fibers[first + lane];
      if (fiber.state == State::kReady) run_fiber(int(first + lane));
      if (has_failed) return;
      waits |= fiber.state == State::kAtWarp;
    }
    if (!waits) return;
    release_warp(first, lanes);
    if (has_failed) return;
  }
}

void run_block() {
  ++counts[kBlocks];
  ++block_serial;
  block_epoch = 0;
  std::memset(warp_epochs, 0, sizeof(warp_epochs));
  const dim3 size = builtins.block_size;
  for (int i = 0; i < num_threads; ++i) {
    fibers[i].state = State::kReady;
    fibers[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  }
  const int warps = (num_threads + kWarp - 1) / kWarp;
  for (;;) {
    for (const int64_t warp : ordered(warps)) {
      run_warp(int(warp) * kWarp);
      if (has_failed) return;
    }
    int exited = 0, waiting = -1;
    for (int i = 0; i < num_threads; ++i) {
      if (fibers[i].state == State::kExited) {
        ++exited;
      } else {
        waiting = i;
      }
    }
    if (waiting < 0) return;
    const Fiber& one = fibers[waiting];
    for (int i = 0; i < num_threads; ++i) {
      if (exited > 0 || fibers[i].line != one.line || fibers[i].file != one.file) {
        return fail("%s:%d: %d of %d threads have ended, or wait at another __syncthreads",
                    base_name(one.file), one.line, exited, num_threads);
      }
      fibers[i].state = State::kReady;
    }
    ++counts[kBarriers];
    ++block_epoch;
  }
}

// --- memory

int find_image(dl_phdr_info* info, size_t, void*) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&builtins);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && (header.p_flags & PF_W) != 0 && here >= begin &&
        here < begin + header.p_memsz) {
      image_base = info->dlpi_addr;
      writable.begin = begin;
      writable.end = begin + header.p_memsz;
      static std::vector<Cell> of_writable(header.p_memsz);
      writable.cells = of_writable.data();
      return 1;
    }
  }
  return 0;
}

bool contains(const Buffer& buffer, uintptr_t address) {
  return address >= buffer.begin && address < buffer.end;
}

Buffer* find_buffer(uintptr_t address) {
  if (last_buffer < buffers.size() && contains(buffers[last_buffer], address)) {
    return &buffers[last_buffer];
  }
  for (last_buffer = 0; last_buffer < buffers.size(); ++last_buffer) {
    if (contains(buffers[last_buffer], address)) return &buffers[last_buffer];
  }
  return nullptr;
}

// Whether nothing orders `before` and an access of this thread.
inline bool races(const Access& before, bool is_shared) {
  if (before.block < first_block_of_launch) return false;
  if (before.block != block_serial || before.warp == kSeveralBlocks) return !is_shared;
  if (before.block_epoch != block_epoch) return false;
  if (before.warp == current / kWarp && before.warp_epoch != warp_epochs[current / kWarp]) {
    return false;
  }
  return before.thread != current;
}

// The least that a later write has to be compared with.
void remember_read(Access& read, bool is_shared) {
  const uint16_t thread = uint16_t(current), warp = uint16_t(current / kWarp);
  Access now{block_serial, thread, warp, block_epoch, warp_epochs[warp]};
  const bool is_of_launch = read.block >= first_block_of_launch;
  if (is_of_launch && !is_shared && (read.block != block_serial || read.warp == kSeveralBlocks)) {
    now.warp = kSeveralBlocks;
  } else if (read.block == block_serial && read.block_epoch == block_epoch) {
    if (read.warp != warp) {
      now.warp = kSeveralWarps;
      now.thread = kSeveralThreads;
    } else if (read.warp_epoch == now.warp_epoch && read.thread != thread) {
      now.thread = kSeveralThreads;
    }
  }
  read = now;
}

template <bool kIsWrite>
void check(uintptr_t address, size_t size, size_t alignment, void* code) {
  if (!is_running) return;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(stacks);
  if (address >= stack && address < stack + kStackBytes * kMaxThreads) return;
  const uintptr_t own = reinterpret_cast<uintptr_t>(&builtins);
  if (address >= own && address < own + sizeof(builtins)) return;
  if (!kIsWrite && address >= host_low && address < host_high) return;
  ++counts[kAccesses];

  const char* access = kIsWrite ? "write" : "read";
  const uintptr_t offset = reinterpret_cast<uintptr_t>(code) - image_base;
  const int thread = current;
  if (address % alignment != 0) {
    return fail_here("%s of %zu bytes at an address that is not a multiple of them, thread %d @%zd",
                     access, size, thread, ptrdiff_t(offset));
  }
  const bool is_shared = contains(writable, address);
  Buffer* buffer = is_shared ? &writable : find_buffer(address);
  if (buffer == nullptr || address + size > buffer->end) {
    ptrdiff_t nearest = PTRDIFF_MAX;
    for (const Buffer& other : buffers) {
      const ptrdiff_t distance = address >= other.begin ? ptrdiff_t(address - other.end)
                                                        : ptrdiff_t(address - other.begin);
      if (std::abs(distance) < std::abs(nearest)) nearest = distance;
    }
    return fail_here(
        "%s of %zu bytes outside of every buffer, %td bytes from the end or the start "
        "of the nearest, thread %d @%zd",
        access, size, nearest, thread, ptrdiff_t(offset));
  }
  for (size_t i = 0; i < size; ++i) {
    Cell& cell = buffer->cells[address - buffer->begin + i];
    if (!kIsWrite && is_shared && cell.write.block != block_serial) {
      return fail_here("read of shared memory that this block has not written, thread %d @%zd",
                       thread, ptrdiff_t(offset));
    }
    const bool write_races = races(cell.write, is_shared);
    if (write_races || (kIsWrite && races(cell.read, is_shared))) {
      return fail_here(
          "race in %s memory: %s of thread %d and %s of thread %d%s @%zd",
          is_shared ? "shared" : "global", access, thread, write_races ? "write" : "read",
          write_races ? cell.write.thread : cell.read.thread,
          (write_races ? cell.write : cell.read).block == block_serial ? "" : " of another block",
          ptrdiff_t(offset));
    }
    if (kIsWrite) {
      const uint16_t warp = uint16_t(current / kWarp);
      cell.write = {block_serial, uint16_t(current), warp, block_epoch, warp_epochs[warp]};
    } else {
      remember_read(cell.read, is_shared);
    }
  }
}

}  // namespace

// --- what the header declares

int lane() { return current % kWarp; }

void wait_for_block(const char* file, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = State::kAtBlock;
  fiber.file = file;
  fiber.line = line;
  to_scheduler(fiber);
}

uint64_t wait_for_warp(WarpOp op, uint32_t mask, uint64_t value, int source, const char* file,
                       int line) {
  Fiber& fiber = fibers[current];
  if ((mask >> lane() & 1) == 0) {
    fail_here("%s:%d: lane %d is not in its own mask %08x", base_name(file), line, lane(), mask);
  }
  fiber.state = State::kAtWarp;
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.file = file;
  fiber.line = line;
  to_scheduler(fiber);
  return fiber.result;
}

const char* run(dim3 grid, dim3 block, Call call, void* closure) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || threads < 1 || threads > kMaxThreads || block.z > 64) {
    return "invalid configuration argument";
  }
  if (writable.cells == nullptr) dl_iterate_phdr(find_image, nullptr);
  if (!fibers_are_fresh) make_fibers();
  ++counts[kLaunches];
  num_threads = int(threads);
  builtins.grid_size = grid;
  builtins.block_size = block;
  kernel_call = call;
  kernel_closure = closure;
  host_low = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  host_high = host_low + (size_t(1) << 16);
  first_block_of_launch = block_serial + 1;
  has_failed = false;
  is_running = true;
  for (const int64_t index : ordered(int64_t(grid.x) * grid.y * grid.z)) {
    builtins.block = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                      unsigned(index / grid.x / grid.y)};
    run_block();
    if (has_failed) break;
  }
  is_running = false;
  if (has_failed) fibers_are_fresh = false;  // those that wait would go on in the next launch
  return has_failed ? message : nullptr;
}

}  // namespace cuda_emulation

// --- for the test, through ctypes

#define CUDA_EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

// The kernels may touch these bytes until the buffers are forgotten.
CUDA_EMULATION_EXPORT void cuda_emulation_add_buffer(uintptr_t address, size_t bytes) {
  using namespace cuda_emulation;
  if (bytes == 0) return;
  for (const Buffer& buffer : buffers) {
    if (buffer.begin == address && buffer.end == address + bytes) return;
  }
  const size_t index = buffers.size();
  if (cells.size() == index) cells.emplace_back();
  if (cells[index].size() < bytes) cells[index] = std::vector<Cell>(bytes);
  buffers.push_back({address, address + bytes, cells[index].data()});
}

CUDA_EMULATION_EXPORT void cuda_emulation_forget_buffers() { cuda_emulation::buffers.clear(); }

// In which order blocks, warps and lanes run: 0 ascending, 1 descending, 2 shuffled by `seed`.
CUDA_EMULATION_EXPORT void cuda_emulation_set_order(int order, uint64_t seed) {
  cuda_emulation::order = static_cast<cuda_emulation::Order>(order);
  cuda_emulation::random_state = seed * 0x9e3779b97f4a7c15u + 1;
}

// Launches, blocks, barriers, warp operations, memory accesses since the module was loaded.
CUDA_EMULATION_EXPORT const uint64_t* cuda_emulation_counts() { return cuda_emulation::counts; }

// --- what the compiler calls

using cuda_emulation::check;

#define CUDA_EMULATION_ACCESS(bytes)                                  \
  extern "C" void __tsan_read##bytes(uintptr_t address) {             \
    check<false>(address, bytes, bytes, __builtin_return_address(0)); \
  }                                                                   \
  extern "C" void __tsan_write##bytes(uintptr_t address) {            \
    check<true>(address, bytes, bytes, __builtin_return_address(0));  \
  }                                                                   \
  extern "C" void __tsan_unaligned_read##bytes(uintptr_t address) {   \
    check<false>(address, bytes, 1, __builtin_return_address(0));     \
  }                                                                   \
  extern "C" void __tsan_unaligned_write##bytes(uintptr_t address) {  \
    check<true>(address, bytes, 1, __builtin_return_address(0));      \
  }
CUDA_EMULATION_ACCESS(1)
CUDA_EMULATION_ACCESS(2)
CUDA_EMULATION_ACCESS(4)
CUDA_EMULATION_ACCESS(8)
CUDA_EMULATION_ACCESS(16)

extern "C" {
void __tsan_read_range(uintptr_t address, size_t size) {
  check<false>(address, size, 1, __builtin_return_address(0));
}
void __tsan_write_range(uintptr_t address, size_t size) {
  check<true>(address, size, 1, __builtin_return_address(0));
}
void* __tsan_memcpy(void* target, const void* source, size_t size) {
  check<false>(reinterpret_cast<uintptr_t>(source), size, 1, __builtin_return_address(0));
  check<true>(reinterpret_cast<uintptr_t>(target), size, 1, __builtin_return_address(0));
  return std::memcpy(target, source, size);
}
void* __tsan_memset(void* target, int value, size_t size) {
  check<true>(reinterpret_cast<uintptr_t>(target), size, 1, __builtin_return_address(0));
  return std::memset(target, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct AlignmentData {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(AlignmentData* data, uintptr_t address) {
  if (!cuda_emulation::is_running) return;
  cuda_emulation::fail_here("%s:%u: address %#zx is not a multiple of %d",
                            cuda_emulation::base_name(data->file), data->line, size_t(address),
                            1 << data->log_alignment);
}
}  // extern "C"
