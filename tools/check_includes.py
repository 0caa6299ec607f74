#!/usr/bin/env python3
"""Checks the include arrows between the folders; prints each breach and exits 1 if there is one.

A folder may include itself and the folders named for it below; everything else in quotes is a breach.
Headers in angle brackets are the standard library's, or a package that the folder may name."""
import pathlib
import re
import sys

ROOT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
ROOT = ROOT if ROOT.is_dir() else ROOT.parent.parent

MODELS = {"layers", "optim", "graph", "core"}
PIPELINES = MODELS | {"models", "diffusion", "io", "jit", "jit/runtime"}
ARROWS = {
    "core": set(),
    "graph": {"core"},
    "jit": {"graph", "core", "jit/runtime"},
    "jit/runtime": {"core"},
    "optim": {"graph", "core"},
    "layers": {"graph", "optim", "core"},
    "models": MODELS,
    "diffusion": {"graph", "core"},
    "io": {"core"},
    "pipelines": PIPELINES,
    "app": PIPELINES | {"pipelines"},
}
ANYTHING = {"examples", "tests", "tools"}
# First path component or file name of a package's headers -> the folders or files that may name it.
PACKAGES = {
    "fmt": {*ARROWS},
    "oneapi": {"core/contract.cc"},
    "dnnl.hpp": {"core/contract.cc"},
    "dnnl.h": {"core/contract.cc"},
    "omp.h": {"core/parallel.cc"},
    "llvm": {"jit"},
    "nlohmann": {"core/json.h", "core/json.cc", "models", "diffusion", "io", "pipelines", "app"},
    "png.h": {"io"},
    "hb.h": {"io"},
    "utf8proc.h": {"models"},
    "hb-ft.h": {"io"},
    "ft2build.h": {"io"},
    "freetype": {"io"},
    "CLI": {"app"},
}
# Headers of the operating system, one level below a folder.
SYSTEM = {"sys", "asm", "linux"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def folder_of(path):
    """The folder of a file or of an include, with jit/runtime told from jit."""
    parts = pathlib.PurePosixPath(path).parts
    return "jit/runtime" if parts[:2] == ("jit", "runtime") else parts[0]


def breach(path, bracket, name):
    """Why `path` may not include `name`, or None."""
    folder = folder_of(path)
    head = name.split("/")[0]
    if folder in ANYTHING:
        return None
    if bracket == '"':
        if not (ROOT / name).is_file():
            return "is no file of this repository, named from its root"
        target = folder_of(name)
        if target == folder or target in ARROWS[folder]:
            return None
        return f"breaks the arrows: {folder} may include {', '.join(sorted(ARROWS[folder])) or 'nothing else'}"
    if head in PACKAGES:
        allowed = PACKAGES[head]
        if folder in allowed or path in allowed:
            return None
        return f"belongs to {', '.join(sorted(allowed))} only"
    if "/" in name and head not in SYSTEM:
        return "is a package that tools/check_includes.py does not know"
    return None


def main():
    files = [p for folder in {f.split("/")[0] for f in ARROWS} | ANYTHING
             for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".cc", ".h", ".def")]
    failures = 0
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            reason = match and breach(path, match[1], match[2])
            if reason:
                print(f"{path}:{number}: {match[2]} {reason}")
                failures += 1
    print(f"{len(files)} files, {failures} breaches of the include arrows")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
