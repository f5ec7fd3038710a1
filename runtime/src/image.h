// Pictures: decoded under limits, brought to the tower's square as Pillow does it, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"

namespace llava_edge {

struct Image {
    int                  width = 0, height = 0;
    std::vector<uint8_t> rgb;  // [height, width, 3]
};

constexpr int64_t MAX_PIXELS      = 40000000;
constexpr int64_t MAX_JPEG_PIXELS = 200000000;  // of one scan: decoded at a half, a quarter or an eighth of its size
constexpr double  TARGET_PIXELS   = 4000000;
constexpr int64_t MAX_ASPECT      = 50;
constexpr uint64_t MAX_FILE_BYTES = 256ull << 20;

// Fail (IMAGE_LIMIT, IMAGE_INVALID) unless a picture of this size is allowed.
void check_image_size(int64_t width, int64_t height, int64_t limit = MAX_PIXELS);

// A picture of rows that lie `stride` bytes apart.
Image copy_rgb(const uint8_t * pixels, int width, int height, size_t stride);

// The bytes of a file: JPEG, PNG, PPM. Transparent pixels show `color`.
Image decode_image(const std::string & bytes, const std::array<uint8_t, 3> & color);

// The same of a picture that may be turned: EXIF's orientation, 1 to 8.
Image turned(Image image, int orientation);

// The orientation that EXIF data (from the TIFF header on) tell; 1 if none.
int exif_orientation(const uint8_t * data, size_t size);

const char * image_formats();

// Pillow 13's resize(..., BICUBIC).
Image resized(const Image & image, int width, int height);

// Lay a picture into a larger one.
void paste(Image & canvas, const Image & image, int left, int top);

// A square of a picture.
Image cropped(const Image & image, int left, int top, int side);

// The tower's square: `fit` of llava_edge/images.py.
Image fitted(Image image, const ImageSpec & spec);

// The picture of the self-check, from integers only.
Image probe_picture(int size);

}  // namespace llava_edge
