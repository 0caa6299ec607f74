// All attention modules of a model at once: what diffusers' models offer as attn_processors,
// set_attn_processor, set_attention_slice and fuse_qkv_projections. `model` is any layer.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "layers/attention.h"

namespace calotype::nn {

// Path, counted from the model, and module; in the order of the model's layers (of a U-Net: down,
// up, mid).
std::vector<std::pair<std::string, Attention*>> AttentionModules(Layer& model);

// "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor" and its processor, in that
// order.
std::vector<std::pair<std::string, AttentionProcessor>> AttnProcessors(Layer& model);

// The same processor for all, or one for each name of AttnProcessors. Either all modules change or
// none. Errors: those of Attention::SetProcessor; ValueError if names are missing or belong to no
// module, all of them listed.
void SetAttnProcessor(Layer& model, const AttentionProcessor& processor);
void SetAttnProcessor(Layer& model, const std::map<std::string, AttentionProcessor>& processors);
// AttnAddedKVProcessor for all if all are of the AddedKV kind, AttnProcessor for all if none is.
// Errors: ValueError for a model with both, with none, with processors that are no variants of
// these two (CrossFrame..., Fused...), or with one that has parameters, which would be lost.
void SetDefaultAttnProcessor(Layer& model);

// Slices the scores: slice_size rows of batch * heads at a time in every module (SlicedAttn... or
// SlicedAttnAddedKVProcessor), one size for each module in the order of AttnProcessors, or
//   "auto": half the heads of each module, "max": one row, "none": the default processors.
// Errors: ValueError for a size above a module's heads or below 1, a list of another length, or a
// module whose processor has parameters, which would be lost.
void SetAttentionSlice(Layer& model, int64_t slice_size);
void SetAttentionSlice(Layer& model, std::span<const int64_t> slice_sizes);
void SetAttentionSlice(Layer& model, std::string_view mode);

// Sets the XFormers form of each processor (XFormers..., CustomDiffusionXFormers...,
// LoRAXFormersAttnProcessor), or with `use` false its 2_0 form (for a module with scale_qk = false
// the plain one). Parameters of the processors keep their values, and are trainable or not as
// before, but they are new objects: an optimizer of the parameters before would no longer reach the
// model, so build it afterwards. Errors: UnsupportedError for a processor without such forms, which
// AddedKV, CrossFrame and Fused ones are.
void SetUseMemoryEfficientAttentionXFormers(Layer& model, bool use,
                                            AttentionOp attention_op = AttentionOp::kAuto);

// Fuses the projections of every module (Attention::FuseProjections) and sets
// FusedAttnProcessor2_0. Returns the processors before, for UnfuseQkvProjections. Errors:
// UnsupportedError with AddedKV processors; ValueError for a module whose processor has parameters.
std::map<std::string, AttentionProcessor> FuseQkvProjections(Layer& model);
void UnfuseQkvProjections(Layer& model, const std::map<std::string, AttentionProcessor>& before);

}  // namespace calotype::nn
