#include "pipelines/latent_cache.h"

#include <system_error>

#include "core/error.h"
#include "core/sha256.h"
#include "io/atomic_file.h"
#include "io/safetensors.h"

namespace calotype {
namespace {

constexpr const char* kDigest = "sha256";

void Add(Sha256& hash, const Tensor& tensor) {
  hash.Update(ToString(tensor.type()) + "\n");
  hash.Update(tensor.raw(), static_cast<uint64_t>(tensor.bytes()));
}

std::string DigestOf(const std::filesystem::path& entry, const LatentMoments& moments) {
  Sha256 hash;
  hash.Update(entry.filename().string() + "\n");  // so that a renamed entry is none
  Add(hash, moments.mean);
  Add(hash, moments.std);
  return hash.Finish();
}

}  // namespace

LatentCache::LatentCache(std::filesystem::path folder, AutoencoderKL& vae, std::string_view how)
    : folder_(std::move(folder)) {
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  Check<FileError>(!error, "{}: cannot make the folder for latents: {}", folder_.string(),
                   error.message());
  RemoveStaleTemporaries(folder_);
  WriteFile(folder_ / "README",
            "What an autoencoder made of the pictures beside this folder, kept by `calotype train\n"
            "--cache-latents-to-disk`. It may be removed at any time.\n",
            Durability::kRenamed);
  Sha256 hash;
  hash.Update(fmt::format("latents\n{}\n{}\n{}\n", CALOTYPE_VERSION, how, vae.config().ToJson()));
  for (const auto& [name, value] : vae.SaveParameters()) {
    hash.Update(name + "\n");
    Add(hash, value);
  }
  maker_ = hash.Finish();
}

std::filesystem::path LatentCache::PathOf(const Tensor& picture) const {
  Sha256 hash;
  hash.Update(maker_ + "\n");
  Add(hash, picture);
  return folder_ / (hash.Finish() + ".safetensors");
}

std::optional<LatentMoments> LatentCache::Read(const std::filesystem::path& entry,
                                               std::string* damaged) const {
  std::error_code ignored;  // what cannot be looked at is an error where it is written
  if (!std::filesystem::exists(entry, ignored)) return std::nullopt;
  try {
    TensorFile file = ReadSafetensors(entry);
    LatentMoments moments{file.tensors["mean"], file.tensors["std"]};
    Check<FileError>(file.tensors.size() == 2 && moments.mean.defined() && moments.std.defined() &&
                         moments.mean.type() == moments.std.type() &&
                         file.metadata[kDigest] == DigestOf(entry, moments),
                     "{}: damaged: its SHA-256 is not that of its numbers", entry.string());
    return moments;
  } catch (const FileError& e) {
    if (damaged) *damaged = e.what();
    return std::nullopt;
  }
}

void LatentCache::Write(const std::filesystem::path& entry, const LatentMoments& moments) const {
  const TensorFile file{{{"mean", moments.mean}, {"std", moments.std}},
                        {{kDigest, DigestOf(entry, moments)}}};
  WriteFile(entry, FormatSafetensors(file), Durability::kRenamed);
}

}  // namespace calotype
