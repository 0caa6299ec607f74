// Anchors whose emitters are not written yet.
#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

void EmitAttention(Emitter&, const AttentionSpec&) {
  Fail<UnsupportedError>("attention is not compiled yet");
}
void EmitAttentionGradient(Emitter&, const AttentionGradientSpec&) {
  Fail<UnsupportedError>("attention gradients are not compiled yet");
}
void EmitGather(Emitter&, const GatherSpec&) {
  Fail<UnsupportedError>("gathers are not compiled yet");
}
void EmitScatterAdd(Emitter&, const ScatterAddSpec&) {
  Fail<UnsupportedError>("scatters are not compiled yet");
}
void EmitPhilox(Emitter&, const PhiloxSpec&) {
  Fail<UnsupportedError>("random numbers are not compiled yet");
}

}  // namespace calotype::jit
