// All of JPEG that is compiled for each level of the processor.
#include "vectors.h"

#include "transforms.h"

#include "rows.h"

#include "jpeg_smooth.h"

#include "jpeg_exact.h"
