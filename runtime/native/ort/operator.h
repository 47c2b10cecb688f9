// What an operator is written against: its node's attributes and constants, a run's inputs and outputs, ORT's threads.
//
// An operator is a class with
//     static constexpr const char* NAME;
//     static constexpr Port INPUTS[], OUTPUTS[];     element type of each, and whether it may be left out
//     explicit Op(const Info&);                      reads attributes and packs constants; throws Failure
//     void compute(Context&);                        throws Failure; called by one thread at a time for a session
// and `describe<Op>()` is the OrtCustomOp for it. No exception leaves the library: it becomes an OrtStatus.
#pragma once

#include <array>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../parallel.h"
#include "abi.h"

namespace headrace {
namespace ort {

struct Port {
  ElementType type;
  Characteristic characteristic = REQUIRED;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The status's message is ONNX Runtime's own and goes up as it is.
struct StatusFailure {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw StatusFailure{status};
}

constexpr size_t MAX_DIMS = 8;

struct Shape {
  std::array<int64_t, MAX_DIMS> dims{};
  size_t count = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> values) {
    for (int64_t value : values) dims[count++] = value;
  }
  int64_t operator[](size_t idx) const { return dims[idx]; }
  int64_t last() const { return dims[count - 1]; }
  int64_t num_elements() const {
    int64_t product = 1;
    for (size_t idx = 0; idx < count; ++idx) product *= dims[idx];
    return product;
  }
  // The product of all but the last.
  int64_t num_rows() const { return count == 0 || last() == 0 ? 0 : num_elements() / last(); }
  Shape with_last(int64_t value) const {
    Shape other = *this;
    other.dims[count - 1] = value;
    return other;
  }
};

// An input or a constant. Its memory is ONNX Runtime's.
struct Tensor {
  const void* bytes = nullptr;
  Shape shape;

  explicit operator bool() const { return bytes != nullptr; }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(bytes);
  }
};

inline Tensor tensor_of(const OrtApi* api, const OrtValue* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(get_type_and_shape(api, value, &info));
  check(get_num_dims(api, info, &tensor.shape.count));
  if (tensor.shape.count > MAX_DIMS) throw Failure("a tensor of more than 8 dimensions");
  check(get_dims(api, info, tensor.shape.dims.data(), tensor.shape.count));
  release_type_and_shape(api, info);
  void* bytes = nullptr;
  check(get_mutable_data(api, const_cast<OrtValue*>(value), &bytes));
  // A tensor without elements may have no memory, and is there all the same.
  static const char nothing = 0;
  tensor.bytes = bytes == nullptr ? &nothing : bytes;
  return tensor;
}

// A node of the graph, when its kernel is made.
class Info {
 public:
  Info(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(get_int(api_, info_, name, &value));
    return value;
  }
  int64_t integer(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    return is_there(get_int(api_, info_, name, &value)) ? value : otherwise;
  }
  float number(const char* name) const {
    float value = 0;
    check(get_float(api_, info_, name, &value));
    return value;
  }
  float number(const char* name, float otherwise) const {
    float value = 0;
    return is_there(get_float(api_, info_, name, &value)) ? value : otherwise;
  }
  // A constant input; empty if the input is left out or not constant. Its memory lives as long as the session.
  Tensor constant(size_t index) const {
    size_t count = 0;
    check(get_num_inputs(api_, info_, &count));
    if (index >= count) return Tensor{};
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (!is_there(get_constant_input(api_, info_, index, &is_constant, &value)) || !is_constant) return Tensor{};
    return tensor_of(api_, value);
  }
  const OrtApi* api() const { return api_; }

 private:
  bool is_there(OrtStatus* status) const {
    if (status != nullptr) release_status(api_, status);
    return status == nullptr;
  }

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// One run of a node.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context, int num_threads)
      : api_(api), context_(context), num_threads_(num_threads) {}

  // Empty if the input is left out.
  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    check(get_input(api_, context_, index, &value));
    return tensor_of(api_, value);
  }
  // Null if nobody reads the output.
  template <typename T>
  T* output(size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(get_output(api_, context_, index, shape.dims.data(), shape.count, &value));
    if (value == nullptr) return nullptr;
    void* bytes = nullptr;
    check(get_mutable_data(api_, value, &bytes));
    return static_cast<T*>(bytes);
  }
  // ONNX Runtime's pool. Valid for this run.
  Parallel parallel() const { return num_threads_ <= 1 ? sequential() : Parallel{run, this, num_threads_}; }

 private:
  static void run(const void* pool, size_t num_tasks, TaskFunction function, void* context) {
    const Context& self = *static_cast<const Context*>(pool);
    // A batch for each task: threads take the next one when they are done, so uneven tasks spread.
    OrtStatus* status = parallel_for(self.api_, self.context_, function, num_tasks, num_tasks, context);
    if (status != nullptr) {
      release_status(self.api_, status);
      run_in_turn(nullptr, num_tasks, function, context);
    }
  }

  const OrtApi* api_;
  OrtKernelContext* context_;
  int num_threads_;
};

// An input that is a constant in most graphs, like a norm's weight: then it is asked for once, not in every run.
class Weight {
 public:
  Weight(const Info& info, size_t index) : index_(index), constant_(info.constant(index)) {}
  // Empty if the input is left out.
  Tensor of(const Context& run) const { return constant_ ? constant_ : run.input(index_); }

 private:
  size_t index_;
  Tensor constant_;
};

// How many threads sessions have that are made from now on: ONNX Runtime does not tell an operator.
int session_threads();

template <typename Op>
struct Kernel {
  const OrtApi* api;
  int num_threads;
  Op op;
};

template <typename Function>
OrtStatus* guarded(const OrtApi* api, const char* name, Function&& function) {
  try {
    function();
    return nullptr;
  } catch (const StatusFailure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return create_status(api, FAIL, (std::string("headrace.") + name + ": " + error.what()).c_str());
  } catch (...) {
    return create_status(api, FAIL, name);
  }
}

template <typename Op>
OrtCustomOp* describe() {
  static OrtCustomOp op{};
  op.version = API_VERSION;
  op.GetName = [](const OrtCustomOp*) { return Op::NAME; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return static_cast<const char*>("CPUExecutionProvider"); };
  op.GetInputType = [](const OrtCustomOp*, size_t idx) { return static_cast<int>(Op::INPUTS[idx].type); };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return sizeof(Op::INPUTS) / sizeof(Port); };
  op.GetOutputType = [](const OrtCustomOp*, size_t idx) { return static_cast<int>(Op::OUTPUTS[idx].type); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return sizeof(Op::OUTPUTS) / sizeof(Port); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t idx) {
    return static_cast<int>(Op::INPUTS[idx].characteristic);
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t idx) {
    return static_cast<int>(Op::OUTPUTS[idx].characteristic);
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, Op::NAME, [&] { *kernel = new Kernel<Op>{api, session_threads(), Op(Info(api, info))}; });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    auto* self = static_cast<Kernel<Op>*>(kernel);
    return guarded(self->api, Op::NAME, [&] {
      Context run(self->api, context, self->num_threads);
      self->op.compute(run);
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  return &op;
}

}  // namespace ort
}  // namespace headrace
