// LLaVA-NeXT's way of looking closer: the whole picture squashed, and tiles of it at more pixels. What
// llava_edge/vision/anyres.py does, to the bit.
#pragma once

#include <vector>

#include "image.h"

namespace llava_edge {

// How a picture was cut: rows x columns tiles, and the size that it had.
struct Layout {
    int rows = 0, columns = 0, width = 0, height = 0;
};

// The squashed whole and then the tiles row by row, all of the tower's size.
std::vector<Image> split(const Image & image, const ImageSpec & spec, Layout & layout);

// Embeddings of the whole and of every tile, each [cell_rows * cell_columns, width], into one picture's [tokens, width].
// The tiles are put together, what shows only padding is cut off, what max_tiles does not allow is scaled down, and
// `newline` [width] ends each row.
std::vector<float> assemble(const std::vector<std::vector<float>> & parts, int cell_rows, int cell_columns,
                            const Layout & layout, int max_tiles, const std::vector<float> & newline);

}  // namespace llava_edge
