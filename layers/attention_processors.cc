// The attention processors. A new one is a function and a line in the table.
#include "graph/functions.h"
#include "layers/attention.h"
#include "layers/attention_math.h"

namespace calotype::nn {

namespace {

// What all processors of the plain kind share: projections in front, output projection behind.
struct Operands {
  Value q, k, v, mask;
};
Operands Prepare(Attention& attention, const AttentionInputs& in) {
  Value tokens = attention.Tokens(in.hidden_states);
  Value source = attention.Source(in.encoder_hidden_states, tokens);
  Value mask =
      attention.PrepareMask(in.attention_mask, tokens.dim(0), tokens.dim(1), source.dim(1));
  return {attention.Query(tokens), attention.Key(source), attention.ValueOf(source), mask};
}

Value AttnProcessor(Attention& attention, const AttentionInputs& in) {
  auto [q, k, v, mask] = Prepare(attention, in);
  Value out = ExplicitAttention(q, k, v, attention.options().heads, attention.scale(), mask).out;
  return attention.Finish(out, in.hidden_states);
}

Value AttnProcessor2_0(Attention& attention, const AttentionInputs& in) {
  auto [q, k, v, mask] = Prepare(attention, in);
  AttentionOptions options{.heads = attention.options().heads, .scale = attention.scale()};
  return attention.Finish(calotype::Attention(q, k, v, options, mask).out, in.hidden_states);
}

void CheckScaled(const Attention& attention) {
  Check<UnsupportedError>(attention.options().scale_qk,
                          "AttnProcessor2_0 always scales by 1/sqrt(dim_head); use AttnProcessor "
                          "for scale_qk = false");
}

constexpr AttentionProcessor kProcessors[] = {{"AttnProcessor", AttnProcessor, nullptr},
                                              {"AttnProcessor2_0", AttnProcessor2_0, CheckScaled}};

}  // namespace

const AttentionProcessor& FindAttentionProcessor(std::string_view name) {
  for (const AttentionProcessor& processor : kProcessors) {
    if (processor.name == name) return processor;
  }
  Fail<UnsupportedError>("attention processor '{}' is not supported; known are {}", name,
                         fmt::join(AttentionProcessorNames(), ", "));
}

std::vector<std::string_view> AttentionProcessorNames() {
  std::vector<std::string_view> names;
  for (const AttentionProcessor& processor : kProcessors) names.push_back(processor.name);
  return names;
}

}  // namespace calotype::nn
