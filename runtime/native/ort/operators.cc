// Registers the operators of the domain `headrace` with a session: ONNX Runtime calls RegisterCustomOps.
#include <atomic>

#include "../variant.h"
#include "attention_operator.h"
#include "linear_operators.h"
#include "norm_operators.h"
#include "recurrent_operators.h"

namespace {
std::atomic<int> num_session_threads{1};
}

int headrace::ort::session_threads() { return num_session_threads.load(); }

HEADRACE_EXPORT void headrace_set_session_threads(int num_threads) { num_session_threads.store(num_threads); }

HEADRACE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace headrace::ort;
  const OrtApi* api = base->GetApi(API_VERSION);
  if (api == nullptr) return nullptr;  // older than 1.18: the operators stay unknown, and the session says so
  OrtCustomOp* const operators[] = {describe<AddNormOp>(), describe<GateUpOp>(), describe<AttentionOp<FLOAT>>(),
                                    describe<AttentionOp<FLOAT16>>(), describe<AttentionOp<INT8>>(),
                                    describe<BlockLinearOp>(), describe<ChannelLinearOp>(), describe<CausalConvOp>(),
                                    describe<RecurrenceOp>()};
  // Every session option that the library is registered with gets the one domain. It lives as long as the process.
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    OrtStatus* status = create_domain(api, "headrace", &domain);
    for (OrtCustomOp* op : operators) {
      if (status == nullptr) status = add_to_domain(api, domain, static_cast<const OrtCustomOp*>(op));
    }
    if (status != nullptr) return status;
  }
  return add_domain(api, options, domain);
}
