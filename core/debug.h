// The debug switches: CALOTYPE_DEBUG=pass,fuse,time,mem (what to log to stderr) and
// CALOTYPE_DUMP=dir (where to write intermediate results). Read once per process.
#pragma once

#include <string>
#include <string_view>

namespace calotype {

// True if CALOTYPE_DEBUG lists `topic` (pass, fuse, time, mem). Errors: ValueError for unknown
// topics.
bool DebugEnabled(std::string_view topic);
// Writes a line to stderr.
void DebugLine(std::string_view text);
// The folder of CALOTYPE_DUMP, created if needed; empty if unset. Errors: FileError.
const std::string& DumpFolder();
// Writes CALOTYPE_DUMP/NN-name with a running number; nothing if unset.
void Dump(std::string_view name, std::string_view text);

}  // namespace calotype
