// JPEG through libjpeg. Its errors leave by longjmp, so nothing with a destructor lives in the functions that call it.

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

#include <jerror.h>

#include "error.h"
#include "image.h"

namespace llava_edge {

Image decode_jpeg(const std::string & bytes);

namespace {

struct Failure {
    jpeg_error_mgr base;
    jmp_buf        jump;
    char           text[JMSG_LENGTH_MAX];
};

[[noreturn]] void on_error(j_common_ptr info) {
    auto * failure = reinterpret_cast<Failure *>(info->err);
    info->err->format_message(info, failure->text);
    longjmp(failure->jump, 1);
}

void on_message(j_common_ptr info, int level) {
    if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) {  // libjpeg would fill the rest with grey
        on_error(info);
    }
}

struct Decoder {
    jpeg_decompress_struct info;
    Failure                failure;
    int                    orientation;
    bool                   begun;
    bool                   several_scans;
};

void find_orientation(Decoder & d) {
    for (jpeg_saved_marker_ptr m = d.info.marker_list; m != nullptr; m = m->next) {
        if (m->marker == JPEG_APP0 + 1 && m->data_length > 6 && std::memcmp(m->data, "Exif\0\0", 6) == 0) {
            d.orientation = exif_orientation(m->data + 6, m->data_length - 6);
            return;
        }
    }
}

// False: `failure.text` says why.
bool read_header(Decoder & d, const std::string & bytes) {
    if (setjmp(d.failure.jump) != 0) {
        return false;
    }
    jpeg_create_decompress(&d.info);
    d.begun = true;
    jpeg_save_markers(&d.info, JPEG_APP0 + 1, 0xFFFF);
    jpeg_mem_src(&d.info, reinterpret_cast<const unsigned char *>(bytes.data()), static_cast<unsigned long>(bytes.size()));
    jpeg_read_header(&d.info, TRUE);
    find_orientation(d);
    d.several_scans = jpeg_has_multiple_scans(&d.info) != 0;
    return true;
}

bool start(Decoder & d, unsigned scale) {
    if (setjmp(d.failure.jump) != 0) {
        return false;
    }
    d.info.scale_num       = 1;
    d.info.scale_denom     = scale;
    d.info.out_color_space = d.info.num_components == 1 ? JCS_GRAYSCALE : d.info.num_components == 4 ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&d.info);
    return true;
}

bool read_rows(Decoder & d, uint8_t * rows) {
    if (setjmp(d.failure.jump) != 0) {
        return false;
    }
    const size_t stride = size_t(d.info.output_width) * size_t(d.info.output_components);
    while (d.info.output_scanline < d.info.output_height) {
        JSAMPROW row = rows + d.info.output_scanline * stride;
        jpeg_read_scanlines(&d.info, &row, 1);
    }
    jpeg_finish_decompress(&d.info);
    return true;
}

// Pillow's draft(): the smallest of 1/8, 1/4, 1/2 that is not below the wanted size.
unsigned reduction(int64_t width, int64_t height) {
    if (width * height <= MAX_PIXELS) {
        return 1;
    }
    const double  scale  = std::sqrt(TARGET_PIXELS / double(width * height));
    const int64_t factor = std::min(width / int64_t(double(width) * scale), height / int64_t(double(height) * scale));
    return factor >= 8 ? 8 : factor >= 4 ? 4 : factor >= 2 ? 2 : 1;
}

uint8_t over_255(int product) {
    const int t = product + 128;
    return static_cast<uint8_t>(((t >> 8) + t) >> 8);
}

// Grey, RGB or Adobe's inverted CMYK to RGB.
void to_rgb(const uint8_t * from, int channels, size_t pixels, uint8_t * to) {
    for (size_t i = 0; i < pixels; i++, from += channels, to += 3) {
        for (int c = 0; c < 3; c++) {
            if (channels == 4) {
                to[c] = static_cast<uint8_t>(from[3] - over_255((255 - from[c]) * from[3]));
            } else {
                to[c] = from[channels == 1 ? 0 : c];
            }
        }
    }
}

}  // namespace

Image decode_jpeg(const std::string & bytes) {
    Decoder d{};
    d.orientation                 = 1;
    d.info.err                    = jpeg_std_error(&d.failure.base);
    d.failure.base.error_exit     = on_error;
    d.failure.base.emit_message   = on_message;
    d.failure.base.output_message = [](j_common_ptr) {};
    struct End {
        Decoder & d;
        ~End() {
            if (d.begun) {
                jpeg_destroy_decompress(&d.info);
            }
        }
    } end{ d };
    if (!read_header(d, bytes)) {
        fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: %s", d.failure.text);
    }
    const int64_t width = d.info.image_width, height = d.info.image_height;
    // With several scans libjpeg holds all coefficients in memory, at whatever scale it decodes.
    check_image_size(width, height, d.several_scans ? MAX_PIXELS : MAX_JPEG_PIXELS);
    if (d.info.num_components != 1 && d.info.num_components != 3 && d.info.num_components != 4) {
        fail(LLAVA_EDGE_IMAGE_UNSUPPORTED, "the JPEG picture has %d channels", d.info.num_components);
    }
    if (!start(d, reduction(width, height))) {
        fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: %s", d.failure.text);
    }
    const size_t         pixels = size_t(d.info.output_width) * d.info.output_height;
    const int            channels = d.info.output_components;
    Image                image{ int(d.info.output_width), int(d.info.output_height), std::vector<uint8_t>(pixels * 3) };
    std::vector<uint8_t> rows(channels == 3 ? 0 : pixels * size_t(channels));
    if (!read_rows(d, channels == 3 ? image.rgb.data() : rows.data())) {
        fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is damaged: %s", d.failure.text);
    }
    if (channels != 3) {
        to_rgb(rows.data(), channels, pixels, image.rgb.data());
    }
    return turned(std::move(image), d.orientation);
}

}  // namespace llava_edge
