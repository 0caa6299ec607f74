// calotype data: makes data sets.
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "app/terminal.h"
#include "io/emoji.h"

namespace calotype::app {

void AddData(Options& app, Selected& selected) {
  Options* data = app.add_subcommand("data", "Make a folder of captioned pictures to train on");
  data->require_subcommand(1);
  Options* emoji = data->add_subcommand(
      "emoji", "The emoji of Debian's fonts-noto-color-emoji with their names");
  emoji->footer("Example: calotype data emoji --out emoji --size 32");
  struct Command {
    EmojiOptions options;
    std::filesystem::path folder;
  };
  auto command = std::make_shared<Command>();
  emoji->add_option("-o,--out,--output,--output-dir", command->folder, "Folder to write")
      ->required();
  emoji
      ->add_option("--size,--resolution", command->options.size, "Width and height of the pictures")
      ->capture_default_str();
  emoji->add_flag("--skin-tones", command->options.skin_tones,
                  "Also the sequences with a skin tone");
  emoji->add_option("--font", command->options.font, "Colour bitmap font")->capture_default_str();
  emoji->add_option("--names", command->options.names, "Unicode's emoji-test.txt")
      ->capture_default_str();
  emoji->callback([command, &selected] {
    selected.run = [command, &selected] {
      EmojiReport report;
      {
        ProgressBar bar("render", selected.quiet);
        report =
            WriteEmojiFolder(command->folder, command->options, [&](int64_t done, int64_t total) {
              bar.Update(done, total, "");
              return CaughtSignal() == 0;
            });
      }
      fmt::print("{} pictures in {}, {} names without a glyph\n", report.written,
                 command->folder.string(), report.skipped.size());
    };
  });
}

}  // namespace calotype::app
