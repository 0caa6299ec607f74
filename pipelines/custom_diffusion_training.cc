#include "pipelines/custom_diffusion_training.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "pipelines/custom_diffusion.h"
#include "pipelines/custom_diffusion_dataset.h"
#include "pipelines/target_options.h"
#include "pipelines/training_setup.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;

constexpr const char* kInitializers = "ktn+pll+ucd";  // rare words of CLIP's vocabulary

struct Word {
  std::string text;
  ParameterPtr embedding;
};

fs::path FileOf(const fs::path& folder, const std::string& word) {
  return folder / (word + ".safetensors");
}

// The new words, each beginning as the first token of its initializer.
std::vector<Word> AddModifierTokens(DiffusionModel& model, const CustomDiffusionTrainOptions& o) {
  std::vector<Word> words;
  if (o.modifier_token.empty()) return words;
  Check(model.text_encoder() && model.tokenizer(),
        "training: modifier_token needs a model whose text encoder is CLIP");
  const std::vector<std::string> texts = SplitList(o.modifier_token, '+'),
                                 initializers =
                                     SplitList(o.initializer_token.empty() ? kInitializers
                                                                           : o.initializer_token,
                                               '+');
  Check(initializers.size() == texts.size() ||
            (o.initializer_token.empty() && initializers.size() > texts.size()),
        "training: {} modifier tokens ({}) and {} initializer tokens; name one for each",
        texts.size(), o.modifier_token, initializers.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    // The word is the name of a file.
    Check(texts[i].find('/') == std::string::npos && texts[i][0] != '.' && texts[i].size() <= 200 &&
              FileOf("", texts[i]) != kCustomDiffusionFile,
          "training: the modifier token {} cannot be the name of a file", Quoted(texts[i]));
    const std::vector<int64_t> ids = model.tokenizer()->Tokenize(initializers[i]);
    Check(!ids.empty(), "training: the initializer token {} has no tokens",
          Quoted(initializers[i]));
    const Tensor start = model.text_encoder()->EmbeddingOf(ids[0]);
    words.push_back({texts[i], model.AddToken(texts[i], start.Reshape({1, start.elements()}))});
  }
  return words;
}

// Errors: ValueError naming a word that no caption uses, so that nothing would train it.
void CheckUsed(const DiffusionModel& model, const Dataset& data, const std::vector<Word>& words) {
  const std::vector<std::string> captions = Captions(data);
  for (const Word& word : words) {
    const std::vector<int64_t> ids = model.tokenizer()->Tokenize(word.text);
    Check(std::ranges::any_of(captions,
                              [&](const std::string& caption) {
                                const auto row = model.tokenizer()->Encode(caption).ids;
                                return std::ranges::find(row, ids[0]) != row.end();
                              }),
          "training: no caption has the modifier token {} within the {} tokens that the model "
          "reads, e.g. \"a photo of a {} cat\"",
          word.text, model.caption_tokens(), word.text);
  }
}

}  // namespace

void Validate(const CustomDiffusionTrainOptions& o) {
  Check(o.freeze_model == "crossattn_kv" || o.freeze_model == "crossattn" ||
            o.freeze_model == "tokens",
        "training: freeze_model is `{}`, must be crossattn_kv, crossattn or tokens",
        o.freeze_model);
  Check(o.freeze_model != "tokens" || !o.modifier_token.empty(),
        "training: freeze_model tokens trains nothing without modifier_token");
  Check(o.initializer_token.empty() || !o.modifier_token.empty(),
        "training: initializer_token has no effect without modifier_token");
  Check(o.modifier_token.empty() || !SplitList(o.modifier_token, '+').empty(),
        "training: modifier_token is `{}`, which names no word", o.modifier_token);
}

TrainOptions CustomDiffusionTrainDefaults() { return TargetTrainDefaults(/*learning_rate=*/1e-5); }

TrainResult TrainCustomDiffusion(CustomDiffusionTrainOptions custom, TrainOptions options,
                                 const fs::path& folder, bool resume,
                                 const std::set<std::string>& chosen, TrainCallbacks callbacks) {
  if (resume) OptionsForResume(folder, kTrainCustomDiffusion, custom, options, chosen);
  Validate(custom);
  auto message = [&](const std::string& text) {
    if (callbacks.message) callbacks.message(text);
  };
  Check(!options.model.empty(), "training: Custom Diffusion needs a model to be trained on");
  Check(!options.train_text_encoder,
        "training: train_text_encoder has no effect on Custom Diffusion, which trains its words");
  std::vector<fs::path> results{folder / kCustomDiffusionFile};
  for (const std::string& word : SplitList(custom.modifier_token, '+'))
    results.push_back(FileOf(folder, word));
  auto add_words = [&](DiffusionModel& to, const Dataset& pictures) {
    const CustomDiffusionDataset data(pictures, to.factor(), !custom.no_augmentation);
    std::vector<Word> words = AddModifierTokens(to, custom);
    CheckUsed(to, data, words);
    return words;
  };
  auto [pictures, model] =
      BeginTraining(options, chosen, folder, resume, results, callbacks, add_words);
  const CustomDiffusionDataset data(*pictures, model->factor(), !custom.no_augmentation);
  const std::vector<Word> words = add_words(*model, *pictures);
  const bool copies = custom.freeze_model != "tokens";
  if (copies) AddCustomDiffusion(model->unet(), custom.freeze_model);
  TrainTarget target{.parameters = CustomDiffusionParameters(model->unet()),
                     .save =
                         [&, &unet = model->unet()](const fs::path& run) {
                           if (copies) SaveCustomDiffusion(run / kCustomDiffusionFile, unet);
                           for (const Word& word : words)
                             SaveWordEmbedding(FileOf(run, word.text), word.text,
                                               word.embedding->value());
                         },
                     .kind = kTrainCustomDiffusion,
                     .own_options = OptionsToJson(custom),
                     .results = results};
  for (const Word& word : words) target.parameters.push_back(word.embedding);
  if (options.scale_lr && !options.class_data.empty()) target.learning_rate_factor = 2;
  int64_t numbers = 0;
  for (const ParameterPtr& p : target.parameters) numbers += p->value().elements();
  message(fmt::format("{} pictures, {} new words, {} numbers to train, {} steps of {}", data.size(),
                      words.size(), numbers, options.max_train_steps, PicturesOfAStep(options)));
  return Trainer(*model, data, options, folder, resume, callbacks, std::move(target)).Run();
}

}  // namespace calotype
