#include "image.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace llava_edge {

namespace {

// Fixed point of Pillow's Resample.c: 8 bits of the pixel and 2 of overshoot are left of 32.
constexpr int PRECISION_BITS = 32 - 8 - 2;
constexpr double SUPPORT     = 2.0;

double bicubic(double x) {
    constexpr double a = -0.5;
    x                  = std::fabs(x);
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    if (x < 2.0) {
        return (((x - 5) * x + 8) * x - 4) * a;
    }
    return 0.0;
}

// The source pixels of each output pixel: the first, how many, and their weights.
struct Window {
    int first = 0, count = 0;
};

struct Weights {
    int                  room = 0;
    std::vector<Window>  windows;
    std::vector<int32_t> values;  // [output, room]
};

Weights make_weights(int from, int to) {
    const double scale        = static_cast<double>(from) / to;
    const double filter_scale = std::max(scale, 1.0);
    const double support      = SUPPORT * filter_scale;
    Weights      w;
    w.room = static_cast<int>(std::ceil(support)) * 2 + 1;
    w.windows.resize(static_cast<size_t>(to));
    w.values.resize(static_cast<size_t>(to) * static_cast<size_t>(w.room));
    std::vector<double> k(static_cast<size_t>(w.room));
    for (int out = 0; out < to; out++) {
        const double center = (out + 0.5) * scale;
        const double step   = 1.0 / filter_scale;
        const int    first  = std::max(0, static_cast<int>(center - support + 0.5));
        const int    last   = std::min(from, static_cast<int>(center + support + 0.5));
        double       sum    = 0.0;
        for (int x = 0; x < last - first; x++) {
            k[static_cast<size_t>(x)] = bicubic((x + first - center + 0.5) * step);
            sum += k[static_cast<size_t>(x)];
        }
        w.windows[static_cast<size_t>(out)] = { first, last - first };
        for (int x = 0; x < last - first; x++) {
            const double weight = sum != 0.0 ? k[static_cast<size_t>(x)] / sum : k[static_cast<size_t>(x)];
            const double scaled = weight * (1 << PRECISION_BITS);
            w.values[static_cast<size_t>(out) * static_cast<size_t>(w.room) + static_cast<size_t>(x)] =
                static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
        }
    }
    return w;
}

uint8_t clip8(int32_t sum) {
    return static_cast<uint8_t>(std::clamp(sum >> PRECISION_BITS, 0, 255));
}

// Sum of `count` pixels, `step` bytes apart, with their weights; three channels at once.
void weigh(const uint8_t * from, size_t step, const int32_t * weights, int count, uint8_t * to) {
    int32_t sums[3] = { 1 << (PRECISION_BITS - 1), 1 << (PRECISION_BITS - 1), 1 << (PRECISION_BITS - 1) };
    for (int i = 0; i < count; i++, from += step) {
        for (int c = 0; c < 3; c++) {
            sums[c] += from[c] * weights[i];
        }
    }
    for (int c = 0; c < 3; c++) {
        to[c] = clip8(sums[c]);
    }
}

Image resized_across(const Image & image, int width) {
    const Weights w = make_weights(image.width, width);
    Image         out{ width, image.height, std::vector<uint8_t>(size_t(width) * size_t(image.height) * 3) };
    for (size_t y = 0; y < size_t(image.height); y++) {
        const uint8_t * row = image.rgb.data() + y * size_t(image.width) * 3;
        for (size_t x = 0; x < size_t(width); x++) {
            const Window window = w.windows[x];
            weigh(row + window.first * 3, 3, w.values.data() + x * size_t(w.room), window.count,
                  out.rgb.data() + (y * size_t(width) + x) * 3);
        }
    }
    return out;
}

Image resized_down(const Image & image, int height) {
    const Weights w      = make_weights(image.height, height);
    const size_t  stride = size_t(image.width) * 3;
    Image         out{ image.width, height, std::vector<uint8_t>(stride * size_t(height)) };
    for (size_t y = 0; y < size_t(height); y++) {
        const Window    window = w.windows[y];
        const uint8_t * from   = image.rgb.data() + size_t(window.first) * stride;
        for (size_t x = 0; x < size_t(image.width); x++) {
            weigh(from + x * 3, stride, w.values.data() + y * size_t(w.room), window.count, out.rgb.data() + y * stride + x * 3);
        }
    }
    return out;
}

Image padded(Image image, const std::array<uint8_t, 3> & color) {
    int side = std::max(image.width, image.height);
    if (image.width == image.height) {
        return image;
    }
    if (int64_t(side) * side > MAX_PIXELS) {
        const int    longest = side;
        const double target  = std::floor(std::sqrt(TARGET_PIXELS));
        side                 = static_cast<int>(target);
        const auto shrink    = [&](int edge) {
            return std::max(1, static_cast<int>(std::nearbyint(double(edge) * side / longest)));
        };
        image = resized(image, shrink(image.width), shrink(image.height));
    }
    Image canvas{ side, side, std::vector<uint8_t>(size_t(side) * size_t(side) * 3) };
    for (size_t i = 0; i < canvas.rgb.size(); i++) {
        canvas.rgb[i] = color[i % 3];
    }
    paste(canvas, image, (side - image.width) / 2, (side - image.height) / 2);
    return canvas;
}

}  // namespace

void check_image_size(int64_t width, int64_t height, int64_t limit) {
    if (width < 1 || height < 1) {
        fail(LLAVA_EDGE_IMAGE_INVALID, "the picture is empty: %lld x %lld pixels", (long long) width, (long long) height);
    }
    if (width > limit / height) {
        fail(LLAVA_EDGE_IMAGE_LIMIT, "the picture has %lld x %lld pixels; at most %lld are allowed", (long long) width,
             (long long) height, (long long) limit);
    }
    if (std::max(width, height) > MAX_ASPECT * std::min(width, height)) {
        fail(LLAVA_EDGE_IMAGE_LIMIT, "the picture is %lld x %lld pixels; an aspect of at most %lld:1 is allowed",
             (long long) width, (long long) height, (long long) MAX_ASPECT);
    }
}

Image copy_rgb(const uint8_t * pixels, int width, int height, size_t stride) {
    const size_t row = size_t(width) * 3;
    Image        image{ width, height, std::vector<uint8_t>(row * size_t(height)) };
    for (size_t y = 0; y < size_t(height); y++) {
        std::copy(pixels + y * stride, pixels + y * stride + row, image.rgb.begin() + ptrdiff_t(y * row));
    }
    return image;
}

Image turned(Image image, int orientation) {
    if (orientation < 2 || orientation > 8) {
        return image;
    }
    const bool swapped = orientation > 4;
    const int  w = swapped ? image.height : image.width, h = swapped ? image.width : image.height;
    const bool mirror_x = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
    const bool mirror_y = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
    Image      out{ w, h, std::vector<uint8_t>(image.rgb.size()) };
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++) {
            const int    across = mirror_x ? w - 1 - x : x, down = mirror_y ? h - 1 - y : y;
            const int    from_x = swapped ? down : across, from_y = swapped ? across : down;
            const size_t from = (size_t(from_y) * size_t(image.width) + size_t(from_x)) * 3;
            std::copy_n(image.rgb.begin() + ptrdiff_t(from), 3, out.rgb.begin() + (ptrdiff_t(y) * w + x) * 3);
        }
    }
    return out;
}

void paste(Image & canvas, const Image & image, int left, int top) {
    for (int y = 0; y < image.height; y++) {
        const auto from = image.rgb.begin() + ptrdiff_t(y) * image.width * 3;
        std::copy(from, from + ptrdiff_t(image.width) * 3,
                  canvas.rgb.begin() + (ptrdiff_t(top + y) * canvas.width + left) * 3);
    }
}

Image cropped(const Image & image, int left, int top, int side) {
    Image out{ side, side, std::vector<uint8_t>(size_t(side) * size_t(side) * 3) };
    for (int y = 0; y < side; y++) {
        const auto from = image.rgb.begin() + (ptrdiff_t(top + y) * image.width + left) * 3;
        std::copy(from, from + ptrdiff_t(side) * 3, out.rgb.begin() + ptrdiff_t(y) * side * 3);
    }
    return out;
}

Image resized(const Image & image, int width, int height) {
    if (image.width == width && image.height == height) {
        return image;
    }
    if (image.width == width) {
        return resized_down(image, height);
    }
    // Pillow's order, found by trying 2,000 sizes: where little width is lost (or some won), the height goes first.
    if (height < image.height && image.height - height > 2 * (image.width - width)) {
        return resized_across(resized_down(image, height), width);
    }
    Image across = resized_across(image, width);
    return across.height == height ? across : resized_down(across, height);
}

Image fitted(Image image, const ImageSpec & spec) {
    if (spec.mode == FitMode::Crop) {
        const int     short_edge = std::min(image.width, image.height);
        const int64_t width = int64_t(spec.size) * image.width / short_edge, height = int64_t(spec.size) * image.height / short_edge;
        const Image   scaled = resized(image, int(width), int(height));
        return cropped(scaled, (scaled.width - spec.size) / 2, (scaled.height - spec.size) / 2, spec.size);
    }
    if (spec.mode == FitMode::Pad) {
        image = padded(std::move(image), spec.pad_color);
    }
    return resized(image, spec.size, spec.size);
}

Image probe_picture(int size) {
    const auto floor_div = [](int a, int b) { return a / b - (a % b < 0 ? 1 : 0); };
    Image      image{ size, size, {} };
    for (int y = 0; y < size; y++) {
        for (int x = 0; x < size; x++) {
            const int squares = (floor_div(3 * x + y, 19) * 83 + floor_div(3 * y - x + 3 * size, 23) * 47) * 29;
            image.rgb.push_back(static_cast<uint8_t>(x * 255 / std::max(1, size - 1)));
            image.rgb.push_back(static_cast<uint8_t>(y * 255 / std::max(1, size - 1)));
            image.rgb.push_back(static_cast<uint8_t>(squares & 255));
        }
    }
    return image;
}

}  // namespace llava_edge
