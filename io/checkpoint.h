// Training checkpoints: one safetensors file `checkpoint-<step>.safetensors` each, written
// atomically and synced, with a SHA-256 of the whole file in its metadata, so that any damage is
// found when it is read and the one before it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace calotype {

struct Checkpoint {
  int64_t step = 0;
  std::map<std::string, Tensor> tensors;        // parameters, moments, averages, ... by name
  std::map<std::string, std::string> metadata;  // anything else, as text (JSON, numbers)
};

// `folder`/checkpoint-<step>.safetensors. Errors: ValueError for a negative step.
std::filesystem::path CheckpointPath(const std::filesystem::path& folder, int64_t step);

// Steps of the checkpoints in `folder` in rising order, judged by name only. Empty if there is no
// such folder.
std::vector<int64_t> ListCheckpoints(const std::filesystem::path& folder);

// Writes CheckpointPath(folder, checkpoint.step); the folder must exist. Once the file is durable
// and if keep > 0, removes the oldest files below this step so that `keep` remain (files of later
// steps are not counted and not touched), and temporary files of killed writers. The metadata keys
// "calotype.step" and "calotype.sha256" are taken. Errors: ValueError; FileError, for example a
// full disk (no older checkpoint is touched then).
void WriteCheckpoint(const std::filesystem::path& folder, const Checkpoint& checkpoint,
                     int keep = 0);

// Errors: FileError if the file is missing, not a checkpoint, or differs in any bit from what was
// written.
Checkpoint ReadCheckpoint(const std::filesystem::path& path);

// The checkpoint of the highest step that reads without error; a damaged one is reported to `warn`
// and the next older one is tried. Nothing if the folder has no checkpoint. Errors: FileError if
// there are checkpoints but none is whole.
std::optional<Checkpoint> ReadLatestCheckpoint(const std::filesystem::path& folder,
                                               const std::function<void(const std::string&)>& warn);

}  // namespace calotype
