// The part of ONNX Runtime's C ABI that our operators use, declared by us, so that no header has to be downloaded.
//
// OrtApi is a table of function pointers to which releases only append: an index means the same function in each. The
// indices are those of onnxruntime_c_api.h; tests/native/test_operators.py runs every one of them in the installed
// release. A function returns null, or a status that its caller releases.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

struct OrtApi {
  void* functions[1];  // as many as the release has
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace headrace {
namespace ort {

// 18 is the first with every field of OrtCustomOp below.
constexpr uint32_t API_VERSION = 18;

enum ElementType : int { UNDEFINED = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, FLOAT16 = 10 };
enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1 };

#define HEADRACE_ORT(index, name, result, ...)                              \
  template <typename... Args>                                               \
  result name(const OrtApi* api, Args... args) {                            \
    typedef result (*Function)(__VA_ARGS__);                                \
    return reinterpret_cast<Function>(api->functions[index])(args...);      \
  }

HEADRACE_ORT(0, create_status, OrtStatus*, int code, const char* message)
HEADRACE_ORT(26, create_domain, OrtStatus*, const char* name, OrtCustomOpDomain** out)
HEADRACE_ORT(27, add_to_domain, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)
HEADRACE_ORT(28, add_domain, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
HEADRACE_ORT(51, get_mutable_data, OrtStatus*, OrtValue*, void** out)
HEADRACE_ORT(60, get_element_type, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int* out)
HEADRACE_ORT(61, get_num_dims, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t* out)
HEADRACE_ORT(62, get_dims, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t* values, size_t count)
HEADRACE_ORT(65, get_type_and_shape, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo** out)
HEADRACE_ORT(85, get_float, OrtStatus*, const OrtKernelInfo*, const char* name, float* out)
HEADRACE_ORT(86, get_int, OrtStatus*, const OrtKernelInfo*, const char* name, int64_t* out)
HEADRACE_ORT(90, get_input, OrtStatus*, const OrtKernelContext*, size_t index, const OrtValue** out)
HEADRACE_ORT(91, get_output, OrtStatus*, OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue**)
HEADRACE_ORT(93, release_status, void, OrtStatus*)
HEADRACE_ORT(99, release_type_and_shape, void, OrtTensorTypeAndShapeInfo*)
HEADRACE_ORT(230, get_num_inputs, OrtStatus*, const OrtKernelInfo*, size_t* out)
HEADRACE_ORT(249, get_constant_input, OrtStatus*, const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**)
HEADRACE_ORT(274, parallel_for, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t total,
             size_t num_batches, void* context)

#undef HEADRACE_ORT

}  // namespace ort
}  // namespace headrace

// A description of one operator, filled in by us and called by ONNX Runtime. Fields in the ABI's order.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
