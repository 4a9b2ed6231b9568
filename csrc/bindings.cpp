// The only C++ file that knows Python. A function of an op (common/op.h) takes tensors and plain
// numbers by position; Torch shows memory, shape, strides, dtype and device of a tensor, and the
// current stream, through DLPack's exchange table: no header and no library of Torch is needed.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/dlpack.h"
#include "dispatch.h"

#ifdef PIXELGEN_CUDA_EMULATION  // tests/cuda_emulation: memory of the CPU stands for that of a GPU
extern "C" void cuda_emulation_add_buffer(uint64_t address, uint64_t bytes);
constexpr bool kIsEmulated = true;
#else
constexpr bool kIsEmulated = false;
#endif

namespace py = pybind11;

namespace pixelgen {
namespace {

// What Torch gave at import; see `connect`.
const dlpack::ExchangeApi* torch_api = nullptr;
PyObject *num_threads = nullptr, *out_of_memory = nullptr;

constexpr int kMaxArguments = 32;

// --- reading arguments

DType dtype_of(const dlpack::Tensor& tensor) {
  constexpr int kKinds[] = {dlpack::kFloat * 256 + 32, dlpack::kBFloat * 256 + 16,
                            dlpack::kFloat * 256 + 16, dlpack::kFloat * 256 + 64,
                            dlpack::kUInt * 256 + 8,   dlpack::kInt * 256 + 64};  // as DType
  const int kind = tensor.lanes == 1 ? tensor.code * 256 + tensor.bits : -1;
  return DType(std::find(std::begin(kKinds), std::end(kKinds), kind) - std::begin(kKinds));
}

// Index of the CUDA device, -1 for the CPU, -2 for any other.
int device_of(const dlpack::Tensor& tensor) {
  if (kIsEmulated) return 0;
  if (tensor.device_type == dlpack::kCuda) return tensor.device_id;
  return tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCudaHost ? -1 : -2;
}

// False with a Python exception where Torch cannot show the object: no tensor, or one that is
// sparse, quantised, nested or on no device of its own (meta).
bool view(PyObject* object, dlpack::Tensor* tensor) {
  return torch_api->view_object(object, tensor) == 0;
}

bool has_memory(const dlpack::Tensor& tensor) {
  if (tensor.data != nullptr) return true;
  for (int i = 0; i < tensor.ndim; ++i)
    if (tensor.shape[i] == 0) return true;
  return false;  // a fake tensor, or a subclass that only wraps others
}

// The name of argument `index` in "x, y, z".
std::string name_of(const char* names, int index) {
  std::string text = names;
  for (; index > 0; --index) text = text.substr(text.find(',') + 2);
  return text.substr(0, text.find(','));
}

struct Function {
  PyMethodDef definition;
  std::string doc;
  const Op *cpu = nullptr, *cuda = nullptr;
  int num_arguments = 0;

  const Op& op() const { return cpu != nullptr ? *cpu : *cuda; }
};

// Raises `type` and names the argument.
void refuse(PyObject* type, const Op& op, int index, const char* what, PyObject* got) {
  PyErr_Clear();
  py::str text(Py_TYPE(got)->tp_name);
  try {
    const py::handle object(got);
    text = py::hasattr(object, "dtype")
               ? py::str("{} of shape {}, {}")
                     .format(text, py::tuple(object.attr("shape")), object.attr("dtype"))
               : py::str("{!r}").format(object);
  } catch (const py::error_already_set&) {  // its type must do
  }
  PyErr_Format(type, "%s: %s %s, got %.200U", op.name, name_of(op.arguments, index).c_str(), what,
               text.ptr());
}

// Fills `argument`; false with a Python exception.
bool read(const Op& op, int index, PyObject* object, Argument* argument, int* device) {
  using Kind = Argument::Kind;
  *argument = {};
  if (object == Py_None) {
    argument->kind = Kind::kNone;
  } else if (PyLong_Check(object)) {  // bool too
    argument->kind = Kind::kInt;
    argument->integer = PyLong_AsLongLong(object);
    if (argument->integer == -1 && PyErr_Occurred()) {
      refuse(PyExc_OverflowError, op, index, "must fit 64 bits", object);
      return false;
    }
  } else if (PyFloat_Check(object)) {
    argument->kind = Kind::kFloat;
    argument->number = PyFloat_AS_DOUBLE(object);
  } else if (PyUnicode_Check(object)) {
    argument->kind = Kind::kText;
    argument->text = PyUnicode_AsUTF8(object);
    return argument->text != nullptr;
  } else {
    dlpack::Tensor tensor;
    if (!view(object, &tensor)) {
      refuse(PyExc_TypeError, op, index, "must be a strided torch.Tensor with memory", object);
      return false;
    }
    const int its_device = device_of(tensor);
    const char* problem = !has_memory(tensor)     ? "must have memory of its own"
                          : its_device == -2      ? "must be on the CPU or a CUDA device"
                          : *device == -2         ? nullptr
                          : *device != its_device ? "must be on the device of the other tensors"
                                                  : nullptr;
    if (problem != nullptr) {
      refuse(PyExc_TypeError, op, index, problem, object);
      return false;
    }
    *device = its_device;
    argument->kind = Kind::kTensor;
    static char nothing;  // an empty tensor may have no address, but null is None
    argument->data =
        tensor.data == nullptr ? &nothing : static_cast<char*>(tensor.data) + tensor.byte_offset;
    argument->ndim = tensor.ndim;
    argument->size = tensor.shape;
    argument->stride = tensor.strides;
    argument->dtype = dtype_of(tensor);
  }
  return true;
}

// --- scratch memory

// Blocks of Torch's allocator, given back when the call ends. On a GPU they may be: what uses them
// next is enqueued behind this call.
class Scratch {
 public:
  explicit Scratch(int device) : device_(device) {}
  ~Scratch() {
    for (dlpack::ManagedTensor* block : blocks_) block->deleter(block);
  }
  const std::string& error() const { return error_; }

  static void* allocate(const Place& place, int64_t bytes) {
    return static_cast<Scratch*>(place.allocator)->allocate(bytes);
  }

 private:
  void* allocate(int64_t bytes) {
    dlpack::Tensor prototype{};
    prototype.device_type = device_ < 0 || kIsEmulated ? dlpack::kCpu : dlpack::kCuda;
    prototype.device_id = device_ < 0 ? 0 : device_;
    int64_t size = bytes / 8 + 1;  // an empty tensor has no address
    prototype.ndim = 1;
    prototype.code = dlpack::kFloat;
    prototype.bits = 64;
    prototype.lanes = 1;
    prototype.shape = &size;
    dlpack::ManagedTensor* block = nullptr;
    const auto set_error = [](void* self, const char*, const char* message) {
      static_cast<Scratch*>(self)->error_ = message;
    };
    if (torch_api->allocate(&prototype, &block, this, set_error) != 0) return nullptr;
    blocks_.push_back(block);
#ifdef PIXELGEN_CUDA_EMULATION
    cuda_emulation_add_buffer(uint64_t(block->tensor.data), uint64_t(bytes));
#endif
    return static_cast<char*>(block->tensor.data) + block->tensor.byte_offset;
  }

  int device_;
  std::vector<dlpack::ManagedTensor*> blocks_;
  std::string error_;
};

// --- calls

PyObject* call(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const Function& function = *static_cast<Function*>(PyCapsule_GetPointer(self, nullptr));
  const Op& op = function.op();
  if (torch_api == nullptr || count != function.num_arguments) {
    PyErr_Format(PyExc_TypeError, "%s: takes %d arguments (%s), got %zd", op.name,
                 function.num_arguments, op.arguments, count);
    return nullptr;
  }
  Argument arguments[kMaxArguments];
  int device = -2;
  for (int i = 0; i < int(count); ++i)
    if (!read(op, i, objects[i], &arguments[i], &device)) return nullptr;
  const Op* chosen = device < 0 ? function.cpu : function.cuda;
  if (chosen == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "%s: this build of pixelgen_kernels has it for %s alone",
                 op.name, device < 0 ? "CUDA" : "the CPU");
    return nullptr;
  }
  Scratch scratch(device);
  Place place{1, device, nullptr, &Scratch::allocate, &scratch};
  if (device < 0) {
    const py::object count = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(num_threads));
    place.num_threads = int(PyLong_AsLong(count.ptr()));
  } else if (!kIsEmulated && torch_api->current_stream(dlpack::kCuda, device, &place.stream) != 0) {
    return nullptr;
  }
  int wrong;
  PyThreadState* const state = PyEval_SaveThread();
  const Status status = chosen->run(arguments, place, &wrong);
  PyEval_RestoreThread(state);
  if (status == nullptr) Py_RETURN_NONE;
  if (wrong >= 0)
    refuse(PyExc_TypeError, op, wrong, status, objects[wrong]);
  else if (std::string_view(status) == kNoMemory)
    PyErr_Format(out_of_memory, "%s: %s", op.name, scratch.error().c_str());
  else
    PyErr_Format(PyExc_RuntimeError, "%s: %s", op.name, status);
  return nullptr;
}

// Whether `shape`, such as "BC|BTC?", is one of this tensor; `sizes` are those of the letters.
bool has_shape(const dlpack::Tensor& tensor, std::string_view shape, int64_t* sizes) {
  while (!shape.empty()) {
    const std::string_view one = shape.substr(0, shape.find_first_of("|?"));
    bool is_it = int(one.size()) == tensor.ndim;
    for (int i = 0; is_it && i < tensor.ndim; ++i) {
      int64_t& size = sizes[int(one[i])];
      is_it = size < 0 || size == tensor.shape[i];
      size = is_it ? tensor.shape[i] : size;
    }
    if (is_it) return true;
    shape.remove_prefix(std::min(shape.size(), one.size() + 1));
  }
  return false;
}

// Whether all arguments but the first are strided floating tensors with memory on one device,
// kRows: and contiguous in their last dimension. The first is "" or their shapes: "BTC BC|BTC? = C"
// are (B, T, C), then (B, C) or (B, T, C) or None, then the shape and dtype of the one before (None
// if it is None), then (C,); a letter that has come before is a size that is known. The quick yes
// of the checks in checks.py, which find out what is wrong.
template <bool kRows>
PyObject* are(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  const char* text = count > 0 ? PyUnicode_AsUTF8(objects[0]) : "";
  if (text == nullptr) return nullptr;
  std::string_view shapes(text);
  int64_t sizes[128];
  std::fill_n(sizes, 128, -1);
  int device = -2;
  dlpack::Tensor tensor{}, before{};
  for (Py_ssize_t i = 1; i < count; ++i, before = tensor) {
    const std::string_view shape = shapes.substr(0, shapes.find(' '));
    shapes.remove_prefix(std::min(shapes.size(), shape.size() + 1));
    const bool is_same = shape == "=" || shape == "=?";
    const bool may_be_none = is_same && objects[i - 1] == Py_None;
    if (objects[i] == Py_None && (may_be_none || (!shape.empty() && shape.back() == '?'))) continue;
    if (may_be_none || !view(objects[i], &tensor)) {
      PyErr_Clear();
      Py_RETURN_FALSE;
    }
    if (device == -2) device = device_of(tensor);
    const int last = tensor.ndim - 1;
    if (device == -2 || device_of(tensor) != device || !has_memory(tensor) ||
        dtype_of(tensor) > DType::kFloat64 ||
        (kRows && last >= 0 && tensor.shape[last] > 1 && tensor.strides[last] != 1))
      Py_RETURN_FALSE;
    if (is_same ? dtype_of(tensor) != dtype_of(before) ||
                      !std::equal(tensor.shape, tensor.shape + tensor.ndim, before.shape,
                                  before.shape + before.ndim)
                : !shape.empty() && !has_shape(tensor, shape, sizes))
      Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef predicates[] = {
    {"are_floats", as_function(&are<false>), METH_FASTCALL,
     "Strided floating tensors of one device, of the shapes of the first argument or any."},
    {"are_rows", as_function(&are<true>), METH_FASTCALL,
     "The same, the last dimension contiguous."},
    {nullptr, nullptr, 0, nullptr}};

// --- the module

void connect(py::handle api, py::object get_num_threads, py::object out_of_memory_error) {
  const auto* table =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), dlpack::kCapsule));
  if (table == nullptr) throw py::error_already_set();
  const uint32_t major = table->major;
  while (table != nullptr && table->major != dlpack::kMajor) table = table->previous;
  if (table == nullptr || table->view_object == nullptr) {
    throw py::import_error("torch's DLPack exchange table has major version " +
                           std::to_string(major) + ", this module was built for version " +
                           std::to_string(dlpack::kMajor));
  }
  torch_api = table;
  num_threads = get_num_threads.release().ptr();
  out_of_memory = out_of_memory_error.release().ptr();
}

void define_ops(py::module_& m) {
  static std::deque<Function> functions;  // Python keeps pointers into it
  for (const Op* op : cpu_ops()) functions.emplace_back().cpu = op;
  for (const Op* op : cuda_ops()) {
    const auto has_name = [&](const Function& function) {
      return std::string(function.op().name) == op->name;
    };
    auto found = std::find_if(functions.begin(), functions.end(), has_name);
    (found != functions.end() ? *found : functions.emplace_back()).cuda = op;
  }
  for (Function& function : functions) {
    const Op& op = function.op();
    const std::string names = op.arguments;
    for (char letter : names) function.num_arguments += letter == ',';
    if (++function.num_arguments > kMaxArguments) throw std::runtime_error("kMaxArguments is low");
    // in the form that inspect.signature reads
    function.doc = std::string(op.name) + "(" + names + ", /)\n--\n\nSee csrc/ops.";
    function.definition = {op.name, as_function(&call), METH_FASTCALL, function.doc.c_str()};
    const py::capsule self(&function);
    m.attr(op.name) = py::reinterpret_steal<py::object>(
        PyCFunction_NewEx(&function.definition, self.ptr(), m.attr("__name__").ptr()));
  }
  PyModule_AddFunctions(m.ptr(), predicates);
}

py::dict build_info() {
  const auto words = [](const char* text) {
    return *text == 0 ? py::list() : py::list(py::str(text).attr("split")(","));
  };
  py::dict info;
  info["version"] = PIXELGEN_VERSION;
  info["compiler"] = PIXELGEN_COMPILER;
  info["cpu_isa"] = cpu_isa();
  info["cpu_isas"] = py::tuple(words(PIXELGEN_CPU_ISAS));
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = *PIXELGEN_CUDA_VERSION != 0;
  info["cuda_version"] =
      *PIXELGEN_CUDA_VERSION == 0 ? py::none() : py::object(py::str(PIXELGEN_CUDA_VERSION));
  info["cuda_archs"] = words(PIXELGEN_CUDA_ARCHS);
  return info;
}

}  // namespace
}  // namespace pixelgen

PYBIND11_MODULE(_C, m) {
  using namespace pixelgen;
  m.doc() = "Compiled kernels of pixelgen_kernels: tensors and numbers by position.";
  m.def("build_info", &build_info, "What was built, and the instruction set in use.");
  m.def("connect", &connect, "Takes torch's DLPack exchange table, before the first call.");
  define_ops(m);
}
