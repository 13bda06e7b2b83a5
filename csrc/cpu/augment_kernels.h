// A view of one image: crop, colours, blur. Included once for each level.
#include "vectors.h"

#include "augment_crop.h"
#include "augment_colour.h"
#include "augment_blur.h"

// The view of a sample, made of its plan in `w` and of `colours`.
static void make_view(const AugmentCall& c, int64_t sample, Workshop& w, const Colours& colours) {
  if (c.bytes) {
    crop<uint8_t>(c, sample, w);
  } else {
    crop<float>(c, sample, w);
  }
  recolour(w, colours);
  finish_view(w, colours.gray, c.out + sample * 3 * c.side * c.side);
}
