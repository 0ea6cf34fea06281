// Headers that tiers share. A tier includes them before it selects its instructions: functions that other tiers use,
// too, must not have them.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "../attention.h"
#include "../gemm.h"
#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"
