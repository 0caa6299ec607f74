// CaptionEncoder: a small text encoder that is trained together with the denoiser. Learned vectors
// of words and positions, then optionally transformer blocks, so that a word's vector can depend on
// its neighbours.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "layers/linear.h"
#include "layers/norm.h"
#include "layers/transformer.h"
#include "models/caption_tokenizer.h"

namespace calotype {

struct CaptionEncoderConfig {
  std::vector<std::string> vocabulary = {"<pad>", "<unk>"};  // see CaptionTokenizer
  int64_t max_length = 8;                                    // T, tokens of a row
  int64_t hidden_size = 64;                                  // D: the U-Net's cross_attention_dim
  int64_t num_layers = 0;                                    // transformer blocks
  int64_t num_attention_heads = 4;
  bool causal = false;  // in the blocks, a token sees itself and those before it, as in CLIP
  bool final_layer_norm = false;

  CaptionTokenizer Tokenizer() const { return {vocabulary, max_length}; }
  // Errors, also of Validate: ValueError for text that is not JSON, unknown fields and bad values.
  static CaptionEncoderConfig FromJson(std::string_view text);
  std::string ToJson() const;
  void Validate() const;
  bool operator==(const CaptionEncoderConfig&) const = default;
};

// Input: ids [B, T] (i32 or i64), T <= max_length. Output [B, T, D]:
//   x = token_embedding[ids] + position_embedding[0..T)
//   each block: x += attn1(norm1(x)), x += ff(norm3(x))
//   y = final_layer_norm(x) if there is one
// Padding is a word like others: it is not masked (with `causal`, the words before it do not see
// it).
class CaptionEncoder : public Layer {
 public:
  explicit CaptionEncoder(const CaptionEncoderConfig& config);  // Errors: as Validate's
  const CaptionEncoderConfig& config() const { return config_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  CaptionEncoderConfig config_;
  nn::Embedding *token_embedding_, *position_embedding_;
  std::vector<nn::BasicTransformerBlock*> blocks_;
  nn::LayerNorm* final_layer_norm_ = nullptr;
};

}  // namespace calotype
