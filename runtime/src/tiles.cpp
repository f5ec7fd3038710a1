#include "tiles.h"

#include <algorithm>
#include <cmath>

namespace llava_edge {

namespace {

constexpr double TOLERANCE = 1.1;

// The resolution that keeps most of the picture's pixels; of equals the one that wastes least, then the first.
Size best_fit(const Image & image, const std::vector<Size> & grid) {
    Size    best      = grid.front();
    int64_t most      = -1, least_waste = 0;
    const int64_t all = int64_t(image.width) * image.height;
    for (const Size & target : grid) {
        const double  scale = std::min(double(target.width) / image.width, double(target.height) / image.height);
        const int64_t shown = std::min(int64_t(image.width * scale) * int64_t(image.height * scale), all);
        const int64_t waste = int64_t(target.width) * target.height - shown;
        if (shown > most || (shown == most && waste < least_waste)) {
            best        = target;
            most        = shown;
            least_waste = waste;
        }
    }
    return best;
}

// The size with its aspect kept that fills the target in one direction; fractions of pixels are rounded up.
Size fitted_size(const Image & image, const Size & target) {
    const double across = double(target.width) / image.width, down = double(target.height) / image.height;
    if (across < down) {
        return { target.width, std::min(int(std::ceil(image.height * across)), target.height) };
    }
    return { std::min(int(std::ceil(image.width * down)), target.width), target.height };
}

// Cells of embeddings, [rows, columns, width].
struct Field {
    int                rows = 0, columns = 0;
    size_t             width = 0;
    std::vector<float> values;

    Field(int r, int c, size_t w) : rows(r), columns(c), width(w), values(size_t(r) * size_t(c) * w) {}

    float *       at(int row, int column) { return values.data() + (size_t(row) * size_t(columns) + size_t(column)) * width; }
    const float * at(int row, int column) const { return values.data() + (size_t(row) * size_t(columns) + size_t(column)) * width; }
};

Field together(const std::vector<std::vector<float>> & parts, int cell_rows, int cell_columns, const Layout & layout) {
    const size_t width = parts.front().size() / (size_t(cell_rows) * size_t(cell_columns));
    Field        field(layout.rows * cell_rows, layout.columns * cell_columns, width);
    for (int row = 0; row < field.rows; row++) {
        for (int tile = 0; tile < layout.columns; tile++) {
            const auto & part = parts[1 + size_t(row / cell_rows) * size_t(layout.columns) + size_t(tile)];
            const size_t line = size_t(cell_columns) * width;
            std::copy_n(part.begin() + ptrdiff_t(size_t(row % cell_rows) * line), line, field.at(row, tile * cell_columns));
        }
    }
    return field;
}

Field cut(const Field & from, int rows, int columns) {
    Field out(from.rows - 2 * rows, from.columns - 2 * columns, from.width);
    for (int row = 0; row < out.rows; row++) {
        std::copy_n(from.at(row + rows, columns), size_t(out.columns) * out.width, out.values.data() + size_t(row) * size_t(out.columns) * out.width);
    }
    return out;
}

// Whole cells of `length`; what is short of one by less than half of the seventh digit counts as one.
int whole(double length) {
    return int(std::floor(length + 0.5e-7));
}

Field unpadded(const Field & field, const Layout & layout) {
    const int rows = field.rows, columns = field.columns;
    if (double(layout.width) / layout.height > double(columns) / rows) {
        return cut(field, (rows - whole(layout.height * (double(columns) / layout.width))) / 2, 0);
    }
    return cut(field, 0, (columns - whole(layout.width * (double(rows) / layout.height))) / 2);
}

// Bilinear interpolation along one axis: cells are squares, and their values stand in the middle.
Field resampled(const Field & field, int count, bool down) {
    const int length = down ? field.rows : field.columns;
    Field     out(down ? count : field.rows, down ? field.columns : count, field.width);
    for (int i = 0; i < count; i++) {
        const double place = std::max((i + 0.5) * (double(length) / count) - 0.5, 0.0);
        const int    low = int(place), high = std::min(low + 1, length - 1);
        const float  share = float(place - low), rest = 1.0f - share;
        for (int k = 0; k < (down ? field.columns : field.rows); k++) {
            const float * a  = down ? field.at(low, k) : field.at(k, low);
            const float * b  = down ? field.at(high, k) : field.at(k, high);
            float *       to = down ? out.at(i, k) : out.at(k, i);
            for (size_t w = 0; w < field.width; w++) {
                to[w] = a[w] * rest + b[w] * share;
            }
        }
    }
    return out;
}

// Python's a // b.
double floor_divided(double a, double b) {
    const double quotient = (a - std::fmod(a, b)) / b;
    const double floored  = std::floor(quotient);
    return quotient - floored > 0.5 ? floored + 1 : floored;
}

// The field with about `room` cells, as transformers counts them; a tenth too many a side stay.
Field shrunk(Field field, int64_t room) {
    const double ratio = std::sqrt(double(field.rows) * field.columns / double(room));
    if (ratio <= TOLERANCE) {
        return field;
    }
    const int rows = std::max(1, int(floor_divided(field.rows, ratio))), columns = std::max(1, int(floor_divided(field.columns, ratio)));
    return resampled(resampled(field, rows, true), columns, false);
}

}  // namespace

std::vector<Image> split(const Image & image, const ImageSpec & spec, Layout & layout) {
    const Size         target = best_fit(image, spec.grid), size = fitted_size(image, target);
    const Image        fitting = resized(image, size.width, size.height);
    Image              canvas{ target.width, target.height, std::vector<uint8_t>(size_t(target.width) * size_t(target.height) * 3) };
    std::vector<Image> parts{ resized(image, spec.size, spec.size) };
    paste(canvas, fitting, (target.width - size.width) / 2, (target.height - size.height) / 2);
    for (int top = 0; top < target.height; top += spec.size) {
        for (int left = 0; left < target.width; left += spec.size) {
            parts.push_back(cropped(canvas, left, top, spec.size));
        }
    }
    layout = { target.height / spec.size, target.width / spec.size, image.width, image.height };
    return parts;
}

std::vector<float> assemble(const std::vector<std::vector<float>> & parts, int cell_rows, int cell_columns,
                            const Layout & layout, int max_tiles, const std::vector<float> & newline) {
    Field field = unpadded(together(parts, cell_rows, cell_columns, layout), layout);
    if (max_tiles > 0) {
        field = shrunk(std::move(field), int64_t(max_tiles) * cell_rows * cell_columns);
    }
    std::vector<float> tokens = parts.front();
    tokens.reserve(tokens.size() + size_t(field.rows) * size_t(field.columns + 1) * field.width);
    for (int row = 0; row < field.rows; row++) {
        tokens.insert(tokens.end(), field.at(row, 0), field.at(row, 0) + size_t(field.columns) * field.width);
        tokens.insert(tokens.end(), newline.begin(), newline.end());
    }
    return tokens;
}

}  // namespace llava_edge
