// The attention processors of diffusers: interchangeable ways in which one Attention module
// computes. Each is a plain struct with the arguments of the class of the same name;
// Attention::SetProcessor takes any of them. They differ in how the scores are computed and in
// parameters of their own, which appear below "processor." in the module.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

namespace calotype::nn {

// The kernel of the XFormers processors. Both never store the scores of all pairs.
enum class AttentionOp : uint8_t {
  kAuto,         // kSingleBlock up to 128 keys, else kFlash
  kFlash,        // blocks of 64 keys with a running maximum
  kSingleBlock,  // all keys of a query at once
};

// Explicit scores: product, softmax, product. The result of the others is the same within rounding.
struct AttnProcessor {
  static constexpr std::string_view kName = "AttnProcessor";
};
// One fused call that never stores the scores. Always scales by 1/sqrt(dim_head): refuses a module
// with scale_qk = false.
struct AttnProcessor2_0 {
  static constexpr std::string_view kName = "AttnProcessor2_0";
};
struct XFormersAttnProcessor {
  static constexpr std::string_view kName = "XFormersAttnProcessor";
  AttentionOp attention_op = AttentionOp::kAuto;
};
// As AttnProcessor for slice_size rows at a time of the batch * heads rows; stores the scores of
// one slice.
struct SlicedAttnProcessor {
  static constexpr std::string_view kName = "SlicedAttnProcessor";
  int64_t slice_size = 1;
};
// As AttnProcessor2_0 with one projection for queries, keys and values (self-attention), or for
// keys and values (cross-attention). Needs Attention::FuseProjections before.
struct FusedAttnProcessor2_0 {
  static constexpr std::string_view kName = "FusedAttnProcessor2_0";
};

// For modules with added_kv_proj_dim: keys and values are those of encoder_hidden_states, by
// add_k_proj and add_v_proj, followed by those of the input itself unless only_cross_attention.
// Input a picture or [B, C, L]; the input is always added to the result.
struct AttnAddedKVProcessor {
  static constexpr std::string_view kName = "AttnAddedKVProcessor";
};
struct AttnAddedKVProcessor2_0 {
  static constexpr std::string_view kName = "AttnAddedKVProcessor2_0";
};
struct SlicedAttnAddedKVProcessor {
  static constexpr std::string_view kName = "SlicedAttnAddedKVProcessor";
  int64_t slice_size = 1;
};

// Self-attention over a video [batch_size * frames, T, C]: every frame attends to the first frame
// of its batch element. Cross-attention as AttnProcessor. Khachatryan et al. 2023,
// arXiv:2303.13439.
struct CrossFrameAttnProcessor {
  static constexpr std::string_view kName = "CrossFrameAttnProcessor";
  int64_t batch_size = 2;
};

// The kernels in which the next two kinds of processors come.
enum class ScoreKernel : uint8_t {
  kExplicit,  // as AttnProcessor
  kFused,     // as AttnProcessor2_0
  kXFormers,  // as XFormersAttnProcessor, with its argument attention_op
};
struct NoArgument {};
template <ScoreKernel kernel>
using AttentionOpArgument =
    std::conditional_t<kernel == ScoreKernel::kXFormers, AttentionOp, NoArgument>;

// Own projections beside the module's, which they replace: to_k_custom_diffusion and
// to_v_custom_diffusion (train_kv), to_q_custom_diffusion and to_out_custom_diffusion.0
// (train_q_out). With encoder_hidden_states no gradient flows through keys and values of token 0.
// hidden_size and cross_attention_dim are the module's if 0. Kumari et al. 2022, arXiv:2212.04488.
template <ScoreKernel kernel>
struct CustomDiffusionProcessor {
  static constexpr std::string_view kName =
      kernel == ScoreKernel::kExplicit ? "CustomDiffusionAttnProcessor"
      : kernel == ScoreKernel::kFused  ? "CustomDiffusionAttnProcessor2_0"
                                       : "CustomDiffusionXFormersAttnProcessor";
  // diffusers' default differs for the last of the three.
  bool train_kv = true, train_q_out = kernel != ScoreKernel::kXFormers;
  int64_t hidden_size = 0, cross_attention_dim = 0;
  bool out_bias = true;
  // Of the result of to_out_custom_diffusion.0, in training mode. It needs the module's input seed,
  // which a U-Net does not have: there training with another value than 0 is a ShapeError.
  double dropout = 0;
  [[no_unique_address]] AttentionOpArgument<kernel> attention_op = {};
};
using CustomDiffusionAttnProcessor = CustomDiffusionProcessor<ScoreKernel::kExplicit>;
using CustomDiffusionAttnProcessor2_0 = CustomDiffusionProcessor<ScoreKernel::kFused>;
using CustomDiffusionXFormersAttnProcessor = CustomDiffusionProcessor<ScoreKernel::kXFormers>;

// Low-rank terms beside the module's projections, to_q(x) + scale to_q_lora(x) and so on for to_k,
// to_v, to_out (see LoRALinearLayer). Sizes are the module's if 0, ranks `rank`. `scale` is
// diffusers' call argument of that name. Hu et al. 2021, arXiv:2106.09685.
template <ScoreKernel kernel>
struct LoRAProcessor {
  static constexpr std::string_view kName = kernel == ScoreKernel::kExplicit ? "LoRAAttnProcessor"
                                            : kernel == ScoreKernel::kFused
                                                ? "LoRAAttnProcessor2_0"
                                                : "LoRAXFormersAttnProcessor";
  int64_t hidden_size = 0, cross_attention_dim = 0, rank = 4;
  std::optional<double> network_alpha = std::nullopt;
  int64_t q_rank = 0, q_hidden_size = 0, v_rank = 0, v_hidden_size = 0, out_rank = 0,
          out_hidden_size = 0;
  double scale = 1;
  [[no_unique_address]] AttentionOpArgument<kernel> attention_op = {};
};
using LoRAAttnProcessor = LoRAProcessor<ScoreKernel::kExplicit>;
using LoRAAttnProcessor2_0 = LoRAProcessor<ScoreKernel::kFused>;
using LoRAXFormersAttnProcessor = LoRAProcessor<ScoreKernel::kXFormers>;
// As AttnAddedKVProcessor, with terms for add_k_proj and add_v_proj too; cross_attention_dim is the
// width of encoder_hidden_states.
struct LoRAAttnAddedKVProcessor {
  static constexpr std::string_view kName = "LoRAAttnAddedKVProcessor";
  int64_t hidden_size = 0, cross_attention_dim = 0, rank = 4;
  std::optional<double> network_alpha = std::nullopt;
  double scale = 1;
};

using AttentionProcessor =
    std::variant<AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor,
                 FusedAttnProcessor2_0, AttnAddedKVProcessor, AttnAddedKVProcessor2_0,
                 SlicedAttnAddedKVProcessor, CrossFrameAttnProcessor, CustomDiffusionAttnProcessor,
                 CustomDiffusionAttnProcessor2_0, CustomDiffusionXFormersAttnProcessor,
                 LoRAAttnProcessor, LoRAAttnProcessor2_0, LoRAXFormersAttnProcessor,
                 LoRAAttnAddedKVProcessor>;

std::string_view NameOf(const AttentionProcessor& processor);  // kName of the one it holds
// The processor of diffusers' class of that name with its default arguments. Errors:
// UnsupportedError for another name, listing the known ones.
AttentionProcessor MakeAttentionProcessor(std::string_view name);
std::vector<std::string_view> AttentionProcessorNames();

}  // namespace calotype::nn
