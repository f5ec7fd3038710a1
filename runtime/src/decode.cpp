// Files of pictures to RGB, as Pillow reads them.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>

#include "error.h"
#include "image.h"

namespace llava_edge {

Image decode_jpeg(const std::string & bytes);
Image decode_png(const std::string & bytes, const std::array<uint8_t, 3> & color);

namespace {

// Binary PPM with 8 bits a channel.
Image decode_ppm(const std::string & bytes) {
    size_t  at = 2;
    int64_t numbers[3];
    for (int64_t & number : numbers) {
        while (at < bytes.size() && (std::isspace(static_cast<unsigned char>(bytes[at])) != 0 || bytes[at] == '#')) {
            at = bytes[at] == '#' ? std::min(bytes.find('\n', at), bytes.size()) : at + 1;
        }
        const size_t start = at;
        for (number = 0; at < bytes.size() && bytes[at] >= '0' && bytes[at] <= '9' && at - start < 9; at++) {
            number = number * 10 + (bytes[at] - '0');
        }
        if (at == start) {
            fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: its PPM header has no number at byte %zu", at);
        }
    }
    check_image_size(numbers[0], numbers[1]);
    if (numbers[2] != 255) {
        fail(LLAVA_EDGE_IMAGE_UNSUPPORTED, "the PPM picture has values up to %lld; expected 255", (long long) numbers[2]);
    }
    const size_t size = static_cast<size_t>(numbers[0] * numbers[1] * 3);
    if (bytes.size() < at + 1 + size) {
        fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: %zu bytes of %zu are there", bytes.size(), at + 1 + size);
    }
    return copy_rgb(reinterpret_cast<const uint8_t *>(bytes.data()) + at + 1, int(numbers[0]), int(numbers[1]), size_t(numbers[0]) * 3);
}

bool starts(const std::string & bytes, std::string_view magic) {
    return bytes.compare(0, magic.size(), magic) == 0;
}

}  // namespace

const char * image_formats() {
    return
#ifdef LLAVA_EDGE_JPEG
        "JPEG, "
#endif
#ifdef LLAVA_EDGE_PNG
        "PNG, "
#endif
        "PPM";
}

int exif_orientation(const uint8_t * data, size_t size) {
    if (size < 8 || (std::memcmp(data, "II*\0", 4) != 0 && std::memcmp(data, "MM\0*", 4) != 0)) {
        return 1;
    }
    const bool big  = data[0] == 'M';
    const auto u16  = [&](size_t at) { return uint32_t(big ? data[at] << 8 | data[at + 1] : data[at + 1] << 8 | data[at]); };
    const auto u32  = [&](size_t at) { return big ? u16(at) << 16 | u16(at + 2) : u16(at + 2) << 16 | u16(at); };
    const size_t at = u32(4);
    if (at > size - 2) {
        return 1;
    }
    const size_t count = u16(at);
    for (size_t i = 0; i < count && at + 2 + 12 * (i + 1) <= size; i++) {
        const size_t entry = at + 2 + 12 * i;
        if (u16(entry) == 0x0112) {
            const uint32_t value = u16(entry + 8);
            return u16(entry + 2) == 3 && value >= 1 && value <= 8 ? int(value) : 1;
        }
    }
    return 1;
}

Image decode_image(const std::string & bytes, const std::array<uint8_t, 3> & color) {
    (void) color;
#ifdef LLAVA_EDGE_JPEG
    if (starts(bytes, "\xff\xd8\xff")) {
        return decode_jpeg(bytes);
    }
#endif
#ifdef LLAVA_EDGE_PNG
    if (starts(bytes, "\x89PNG\r\n\x1a\n")) {
        return decode_png(bytes, color);
    }
#endif
    if (starts(bytes, "P6")) {
        return decode_ppm(bytes);
    }
    fail(LLAVA_EDGE_IMAGE_UNSUPPORTED, "this is no picture of a format that is read here: %s", image_formats());
}

}  // namespace llava_edge
