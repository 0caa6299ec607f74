// How an Attention module and its processor build graph together; for layers/attention*.cc only.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "layers/attention.h"
#include "layers/lora.h"

namespace calotype::nn {

// A layer that a processor adds below "processor.": a low-rank term, or a linear layer.
struct ProcessorLayer {
  std::string name;
  Linear::Options linear;
  std::optional<LoRALinearLayer::Options> lora;
};

// The layers that `processor` needs in `attention`. Errors: as Attention::SetProcessor.
std::vector<ProcessorLayer> DeclareProcessor(const Attention& attention,
                                             const AttentionProcessor& processor);

// How the scores are computed.
struct AttentionKernel {
  enum class Kind : uint8_t { kExplicit, kSliced, kFused, kXFormers } kind = Kind::kExplicit;
  int64_t slice_size = 0;
  AttentionOp op = AttentionOp::kAuto;
};

struct AttentionProcessorBuilder {
  Attention& attention;
  const AttentionInputs& in;

  Value Build();

 private:
  Value Plain(const AttentionKernel& kernel);
  Value FusedProjections();
  Value AddedKV(const AttentionKernel& kernel);
  Value CrossFrame(int64_t batch_size);
  Value CustomDiffusion(const AttentionKernel& kernel);

  // The projection `name` of x: the processor's own in place of the module's, or beside it.
  Value Project(std::string_view name, Linear* base, Value x);
  Value Query(Value tokens);  // [B, T, inner], after norm_q
  Value Key(Value source);    // [B, S, inner], after norm_k
  Value ValueOf(Value source);
  Value Out(Value attended);  // with dropout, in training mode
  // [B, T, C] of a picture or of tokens, after spatial_norm and group_norm.
  Value Tokens();
  // Where keys and values come from: norm_cross(encoder_hidden_states), or `tokens`.
  Value Source(Value tokens);
  // The mask as [B, 1 or heads, 1 or T, S], by diffusers' prepare_attention_mask: if its last size
  // is not that of the keys, `appended` zeros follow. Errors: ShapeError if the result does not
  // fit.
  Value Mask(int64_t batch, int64_t tokens, int64_t keys, int64_t appended);
  Value Attend(const AttentionKernel& kernel, Value q, Value k, Value v, Value mask);
  // Back to the shape of hidden_states, residual, rescale.
  Value Finish(Value y);
};

}  // namespace calotype::nn
