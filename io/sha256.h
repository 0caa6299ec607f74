#pragma once
#include "core/sha256.h"
