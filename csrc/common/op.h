// How an op's functions become functions of the Python module: a struct names its arguments in the
// order of Python's call,
//
//   struct SwigluFwd {
//     Rows<> x;
//     Dense y;
//     PIXELGEN_ARGUMENTS(x, y)
//   };
//
// a function takes them and says where it runs, and the end of its file registers it:
//
//   Status swiglu_fwd(const SwigluFwd& a, const Place& place);
//   PIXELGEN_OPS(swiglu, PIXELGEN_OP(swiglu_fwd), PIXELGEN_OP(swiglu_bwd))
//
// Everything is constant data: files of an instruction set that this processor lacks must not run
// code when the module is loaded, so there are no static constructors.
#pragma once

#include <cstring>

#include "tensor.h"

namespace pixelgen {

// One argument as it comes from Python.
struct Argument {
  enum class Kind { kNone, kTensor, kInt, kFloat, kText } kind;
  // of a tensor
  void* data;
  int ndim;
  const int64_t *size, *stride;
  DType dtype;
  // of what else there is
  int64_t integer;
  double number;
  const char* text;
};

// Where a call runs.
struct Place {
  int num_threads;  // of the CPU
  int device;       // of CUDA; -1 for the CPU
  void* stream;
  // Memory of Torch's own allocator until the call ends, or null; see bindings.cpp.
  void* (*allocate)(const Place& place, int64_t bytes);
  void* allocator;

  template <typename T>
  PIXELGEN_MEMBER T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(*this, count * int64_t(sizeof(T))));
  }
};
constexpr Status kNoMemory = "no memory for partial sums";

// A function of the module. `run` reads the arguments, of which there are as many as names, and
// calls it; an argument that it cannot take is `*wrong`, of no argument -1.
struct Op {
  const char* name;
  const char* arguments;  // "x, y"
  Status (*run)(const Argument* arguments, const Place& place, int* wrong);
};

#define PIXELGEN_ARGUMENTS(...)                      \
  static constexpr const char* kNames{#__VA_ARGS__}; \
  template <typename Reader>                         \
  Status read(Reader& reader) {                      \
    return reader.read(__VA_ARGS__);                 \
  }

// Words that Python writes for the values 0, 1, ... of an enum.
#define PIXELGEN_WORDS(Enum, ...)                              \
  inline constexpr const char* words_of_##Enum[]{__VA_ARGS__}; \
  constexpr auto& words_of(Enum) { return words_of_##Enum; }

namespace {

class Reader {
 public:
  explicit Reader(const Argument* first) : next_(first) {}
  const Argument* next() const { return next_; }

  // Fills the fields, in order, up to the first that cannot be; its argument is next().
  template <typename... Fields>
  Status read(Fields&... fields) {
    Status status = nullptr;
    ((status = status != nullptr ? status : take(&fields)), ...);
    return status;
  }

 private:
  using Kind = Argument::Kind;

  template <typename Field>
  Status take(Field* field) {
    const Status status = fill(*next_, field);
    if (status == nullptr) ++next_;
    return status;
  }

  // A tensor of `least` to `most` dimensions, of a dtype up to `widest`; kRows: contiguous in the
  // last dimension.
  template <bool kRows = false>
  static Status problem(const Argument& from, int least, int most, DType widest = DType::kFloat64) {
    if (from.kind != Kind::kTensor) return "must be a tensor";
    if (from.dtype > widest) return "has a dtype that is not taken here";
    if (from.ndim < least || from.ndim > most) return "has a wrong number of dimensions";
    const int last = from.ndim - 1;
    const bool is_row = !kRows || from.size[last] <= 1 || from.stride[last] == 1;
    return is_row ? nullptr : "must be contiguous in its last dimension";
  }

  // Dimensions `first` and on of a tensor become those of `to` from `at` on.
  template <int kRank>
  static Status copy(const Argument& from, View<kRank>* to, int first = 0, int at = 0) {
    to->data = from.data;
    to->dtype = from.dtype;
    for (; first < from.ndim; ++first, ++at)
      to->size[at] = from.size[first], to->stride[at] = from.stride[first];
    return nullptr;
  }

  template <Need kNeed>
  static bool is_left_out(const Argument& from) {
    return kNeed == Need::kOptional && from.kind == Kind::kNone;
  }

  template <int kRank, Need kNeed>
  static Status fill(const Argument& from, Tensor<kRank, kNeed>* to) {
    if (is_left_out<kNeed>(from)) return nullptr;
    const Status status = problem(from, kRank, kRank);
    return status != nullptr ? status : copy(from, to);
  }
  template <int kRank>
  static Status fill(const Argument& from, Pixels<kRank>* to) {
    const Status status = problem(from, kRank, kRank, DType::kUInt8);
    return status != nullptr ? status : copy(from, to);
  }
  static Status fill(const Argument& from, Indices* to) {
    if (is_left_out<Need::kOptional>(from)) return nullptr;
    const Status status = problem(from, 1, 1, DType::kInt64);
    if (status != nullptr) return status;
    return from.dtype == DType::kInt64 ? copy(from, to) : "must be int64";
  }
  template <Need kNeed>
  static Status fill(const Argument& from, Rows<kNeed>* to) {
    if (is_left_out<kNeed>(from)) return nullptr;
    const Status status = problem<true>(from, 1, 64);
    if (status != nullptr) return status;
    const int last = from.ndim - 1;
    to->size[0] = to->size[1] = 1, to->stride[0] = to->stride[1] = 0;
    copy(from, to, last > 0 ? last - 1 : 0, last > 0 ? 1 : 2);
    for (int i = last - 2; i >= 0; --i) {  // into what is collapsed already
      if (from.size[i] == 1) continue;
      if (to->size[0] == 1) to->stride[0] = from.stride[i];
      const bool is_even = from.stride[i] == to->size[0] * to->stride[0] || to->size[0] == 1;
      if (!is_even && from.size[i] != 0) return "must be evenly spaced in its leading dimensions";
      to->size[0] *= from.size[i];
    }
    return nullptr;
  }
  template <Need kNeed>
  static Status fill(const Argument& from, PerSample<kNeed>* to) {
    if (is_left_out<kNeed>(from)) return nullptr;
    const Status status = problem<true>(from, 2, 3);
    if (status != nullptr) return status;
    copy(from, to);
    to->per_row = from.ndim == 3;
    if (to->per_row) return nullptr;
    to->size[2] = to->size[1], to->stride[2] = 1;
    to->size[1] = 1, to->stride[1] = 0;
    return nullptr;
  }
  static Status fill(const Argument& from, Dense* to) {
    const Status status = problem(from, 0, 64);
    if (status != nullptr) return status;
    to->numel = 1;
    bool is_dense = true;
    for (int i = from.ndim - 1; i >= 0; --i) {
      is_dense = is_dense && (from.size[i] == 1 || from.stride[i] == to->numel);
      to->numel *= from.size[i];
    }
    if (!is_dense && to->numel > 0) return "must be dense";
    to->data = to->numel > 0 ? from.data : nullptr;
    to->dtype = from.dtype;
    return nullptr;
  }
  static Status fill(const Argument& from, double* to) {
    *to = from.kind == Kind::kInt ? double(from.integer) : from.number;
    const bool is_number = from.kind == Kind::kInt || from.kind == Kind::kFloat;
    return is_number ? nullptr : "must be a number";
  }
  static Status fill(const Argument& from, int64_t* to) {  // None is 0
    *to = from.integer;
    return from.kind == Kind::kInt || from.kind == Kind::kNone ? nullptr : "must be an int";
  }
  template <typename Enum>
  static Status fill(const Argument& from, Enum* to) {
    int value = 0;
    for (const char* word : words_of(Enum{})) {
      *to = Enum(value++);
      if (from.kind == Kind::kText && std::strcmp(word, from.text) == 0) return nullptr;
    }
    return "is no word that is known here";
  }

  const Argument* next_;
};

template <typename Arguments>
Arguments arguments_of(Status (*)(const Arguments&, const Place&));

// What Op::run is. Guard: made for the time of the call, of the place; its status() may be an
// error.
template <auto kFunction, typename Guard>
Status run(const Argument* first, const Place& place, int* wrong) {
  decltype(arguments_of(kFunction)) arguments{};
  Reader reader(first);
  *wrong = -1;
  Status status = arguments.read(reader);
  if (status != nullptr) {
    *wrong = int(reader.next() - first);
    return status;
  }
  const Guard guard(place);
  return guard.status() != nullptr ? guard.status() : kFunction(arguments, place);
}

struct NoGuard {
  explicit NoGuard(const Place&) {}
  Status status() const { return nullptr; }
};

}  // namespace

#ifndef PIXELGEN_GUARD  // common/vec.cuh has one that selects the device
#define PIXELGEN_GUARD NoGuard
#endif
#define PIXELGEN_OP(function) \
  Op { #function, decltype(arguments_of(&function))::kNames, &run<&function, PIXELGEN_GUARD> }
// The table of a file, whose name is `stem`; CMake collects the names of the files.
#define PIXELGEN_OPS(stem, ...) \
  extern const Op stem##_ops[]; \
  const Op stem##_ops[] = {__VA_ARGS__, Op{}};

}  // namespace pixelgen
