// PNG through libpng. Its errors leave by longjmp, so nothing with a destructor lives in the functions that call it.

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include <png.h>

#include "error.h"
#include "image.h"

namespace llava_edge {

Image decode_png(const std::string & bytes, const std::array<uint8_t, 3> & color);

namespace {

struct Decoder {
    png_structp png  = nullptr;
    png_infop   info = nullptr;
    const char *next = nullptr, *end = nullptr;
    char        text[200] = "";

    ~Decoder() { png_destroy_read_struct(&png, &info, nullptr); }
};

void on_error(png_structp png, png_const_charp text) {
    auto * d = static_cast<Decoder *>(png_get_error_ptr(png));
    std::strncpy(d->text, text, sizeof d->text - 1);
    longjmp(png_jmpbuf(png), 1);
}

void on_read(png_structp png, png_bytep to, size_t size) {
    auto * d = static_cast<Decoder *>(png_get_io_ptr(png));
    if (size > size_t(d->end - d->next)) {
        png_error(png, "it ends too early");
    }
    std::memcpy(to, d->next, size);
    d->next += size;
}

// Chunks that nothing here reads. They are packed, or may come a thousand times: libpng would hold gigabytes of them.
constexpr png_byte SKIPPED[] = "tEXt\0zTXt\0iTXt\0sPLT\0iCCP";
constexpr int      N_SKIPPED = sizeof SKIPPED / 5;
// Palettes and EXIF data need less.
constexpr png_alloc_size_t MAX_CHUNK_BYTES = 1 << 20;

bool read_info(Decoder & d) {
    if (setjmp(png_jmpbuf(d.png)) != 0) {
        return false;
    }
    png_set_user_limits(d.png, 0x7fffffff, 0x7fffffff);
    png_set_chunk_malloc_max(d.png, MAX_CHUNK_BYTES);
    png_set_keep_unknown_chunks(d.png, PNG_HANDLE_CHUNK_NEVER, SKIPPED, N_SKIPPED);
    png_set_read_fn(d.png, &d, on_read);
    png_read_info(d.png, d.info);
    return true;
}

// Grey of 16 bits stays as it is; everything else becomes RGBA of 8 bits.
bool prepare(Decoder & d, bool deep_grey) {
    if (setjmp(png_jmpbuf(d.png)) != 0) {
        return false;
    }
    if (!deep_grey) {
        png_set_strip_16(d.png);
        png_set_expand(d.png);
        png_set_gray_to_rgb(d.png);
        png_set_add_alpha(d.png, 0xff, PNG_FILLER_AFTER);
    }
    png_set_interlace_handling(d.png);
    png_read_update_info(d.png, d.info);
    return true;
}

bool read_rows(Decoder & d, png_bytepp rows) {
    if (setjmp(png_jmpbuf(d.png)) != 0) {
        return false;
    }
    png_read_image(d.png, rows);
    png_read_end(d.png, d.info);
    return true;
}

bool orientation(Decoder & d, int * found) {
    if (setjmp(png_jmpbuf(d.png)) != 0) {
        return false;
    }
#ifdef PNG_eXIf_SUPPORTED
    png_uint_32 size = 0;
    png_bytep   data = nullptr;
    if (png_get_eXIf_1(d.png, d.info, &size, &data) != 0) {
        *found = exif_orientation(data, size);
    }
#endif
    return true;
}

// Pillow's blending of 8 bits.
uint8_t blend(uint8_t below, uint8_t above, int alpha) {
    const int t = below * (255 - alpha) + above * alpha + 128;
    return static_cast<uint8_t>(((t >> 8) + t) >> 8);
}

// The upper byte; values that fit 8 bits stay, as llava_edge/images.py has it.
void flatten_grey(const std::vector<uint8_t> & rows, Image & image) {
    bool deep = false;
    for (size_t i = 0; i < rows.size(); i += 2) {
        deep = deep || rows[i] != 0;
    }
    for (size_t i = 0; i < rows.size() / 2; i++) {
        std::fill_n(image.rgb.begin() + ptrdiff_t(i * 3), 3, rows[2 * i + (deep ? 0 : 1)]);
    }
}

[[noreturn]] void damaged(const Decoder & d) {
    fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: %s", d.text);
}

}  // namespace

Image decode_png(const std::string & bytes, const std::array<uint8_t, 3> & color) {
    Decoder d;
    d.next = bytes.data();
    d.end  = bytes.data() + bytes.size();
    d.png  = png_create_read_struct(PNG_LIBPNG_VER_STRING, &d, on_error, [](png_structp, png_const_charp) {});
    d.info = d.png != nullptr ? png_create_info_struct(d.png) : nullptr;
    if (d.info == nullptr) {
        throw std::bad_alloc();
    }
    if (!read_info(d)) {
        damaged(d);
    }
    check_image_size(png_get_image_width(d.png, d.info), png_get_image_height(d.png, d.info));
    const bool deep_grey = png_get_color_type(d.png, d.info) == PNG_COLOR_TYPE_GRAY && png_get_bit_depth(d.png, d.info) == 16 &&
                           png_get_valid(d.png, d.info, PNG_INFO_tRNS) == 0;
    if (!prepare(d, deep_grey)) {
        damaged(d);
    }
    Image        image{ int(png_get_image_width(d.png, d.info)), int(png_get_image_height(d.png, d.info)), {} };
    const size_t stride = png_get_rowbytes(d.png, d.info), expected = size_t(image.width) * (deep_grey ? 2 : 4);
    if (stride != expected) {
        fail(LLAVA_EDGE_INTERNAL, "libpng gives rows of %zu bytes; expected %zu", stride, expected);
    }
    std::vector<uint8_t>   pixels(stride * size_t(image.height));
    std::vector<png_bytep> rows;
    for (size_t y = 0; y < size_t(image.height); y++) {
        rows.push_back(pixels.data() + y * stride);
    }
    int turn = 1;
    if (!read_rows(d, rows.data()) || !orientation(d, &turn)) {
        damaged(d);
    }
    image.rgb.resize(size_t(image.width) * size_t(image.height) * 3);
    if (deep_grey) {
        flatten_grey(pixels, image);
    } else {
        for (size_t i = 0; i < image.rgb.size(); i++) {
            image.rgb[i] = blend(color[i % 3], pixels[i / 3 * 4 + i % 3], pixels[i / 3 * 4 + 3]);
        }
    }
    return turned(std::move(image), turn);
}

}  // namespace llava_edge
