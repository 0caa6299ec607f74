// Prompt-to-Prompt (Hertz et al. 2022, arXiv:2208.01626): pictures of several prompts that share
// the layout of the first. All are drawn from one noise; in the U-Net the edited pictures take
// attention probabilities from the source picture, by words, for a part of the steps. The edit is
// part of the graph, so that it is compiled with the U-Net.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"
#include "pipelines/prompt_tokens.h"
#include "pipelines/text_to_image.h"

namespace calotype {

// ---------------------------------------------------------------- tables

// Part of the steps, as fractions: steps int(begin * N) to int(end * N) - 1.
struct StepRange {
  double begin = 0, end = 1;
  bool operator==(const StepRange&) const = default;
};

// M [S, S], so that A M are the source's probabilities A [.., S] by the words of the target: 1 from
// a token to the one that stands for it; from the tokens of a replaced word to those of the
// replacement, 1 one by one if they are as many, else 1 / number of the target's from each.
// Errors: ValueError unless both have the same number of words.
Tensor ReplacementMap(const PromptTokens& source, const PromptTokens& target);

// The target's tokens as tokens of the source, aligned by Needleman and Wunsch (gap 0, match 1,
// mismatch -1; of equal scores a gap in the source wins, then one in the target): the source's
// index, or -1 for a token that the source does not have. Behind the target's ids a position is
// itself.
std::vector<int64_t> RefinementMap(std::span<const int64_t> source, std::span<const int64_t> target,
                                   int64_t length);

// alpha [N + 1, S]: 1 where the source's probabilities count in a step for a token of the target.
// `ranges` holds a range for each of some words, and under "default_" (0 to 1 if it is not there)
// for all others, with N + 1 in place of N. Words that the prompt does not have are skipped.
Tensor CrossReplaceTable(const PromptTokens& target, const std::map<std::string, StepRange>& ranges,
                         int64_t steps);

// ---------------------------------------------------------------- editing

// The arguments of diffusers' Prompt2PromptPipeline.
struct AttentionEditOptions {
  // replace: word by word, the prompts have as many words as each other. refine: the target adds
  // words. reweight: the equalizer alone.
  std::string edit_type = "replace";
  // Steps in which cross-attention is the source's: by words of the target, see CrossReplaceTable.
  std::map<std::string, StepRange> n_cross_replace = {{"default_", {0, 0.4}}};
  // Steps in which self-attention is the source's, in layers of at most self_pixels pixels.
  StepRange n_self_replace = {0, 0.4};
  int64_t self_pixels = 16 * 16;
  // Factors of the probabilities of words of the targets, on top of replace or refine.
  std::vector<std::string> equalizer_words;
  std::vector<double> equalizer_strengths;
  // Words, one text for each prompt (source first) or none: outside of where they are seen, the
  // pictures stay the source's.
  std::vector<std::string> local_blend_words;
  // Words whose places are excepted from that; one text for each prompt or none.
  std::vector<std::string> substruct_words;
  double blend_threshold = 0.3;  // of the largest value of a map
  double start_blend = 0.2;      // share of the steps before blending begins
};

// The numbers of an edit for one source and P - 1 targets. In cross-attention a target's
// probabilities A_i become (A_0 map_i) from_source_i + A_i own_i, column by column.
struct AttentionEditTables {
  Tensor map;                            // [P-1, S, S]
  std::vector<Tensor> from_source, own;  // [P-1, S] for each step
  std::vector<float> self;               // 1 in steps whose self-attention is the source's
};
// Errors: ValueError for fewer than two prompts, an unknown edit_type, ranges and strengths out of
// order, words that a prompt does not have, and prompts whose words do not fit edit_type.
AttentionEditTables MakeAttentionEditTables(std::span<const PromptTokens> prompts,
                                            const AttentionEditOptions& options, int64_t steps);

// Where the words are, [P, height, width] of 0 and 1: maps [P, L, S] summed over steps (L pixels of
// a picture of the same proportions), the columns of each prompt's `positions` added, the mean over
// the maps, largest of 3 x 3 neighbours if `pool`, to height x width (nearest pixel), above
// `threshold` times the largest value; and where the first prompt's are.
Tensor LocalBlendMask(std::span<const Tensor> maps, std::span<const std::vector<int64_t>> positions,
                      int64_t height, int64_t width, double threshold, bool pool);

// Pictures [P, 3, height, width] of prompts[0], the source, and of the others, edited. All but the
// prompts is taken from `options`: seeds[0] is the seed of all, batch_size and hooks are not used.
// Errors: ValueError for rng torch-batch, which draws another noise for each picture; those of
// MakeAttentionEditTables and TextToImagePipeline::Generate.
Tensor EditPictures(TextToImagePipeline& pipeline, std::span<const std::string> prompts,
                    GenerateOptions options, const AttentionEditOptions& edit,
                    const GenerateCallbacks& callbacks = {});

}  // namespace calotype
