// What an mmproj file says of a vision tower, checked.
#pragma once

#include <string>
#include <vector>

#include "gguf_header.h"

namespace llava_edge {

// What ends a row of tiles, in files of models that look at tiles.
constexpr const char * NEWLINE = "v.image_newline";

// Shapes: W width, F width of the feed-forward layers, P patches, D width of the language model's embeddings.
struct TowerShape {
    int              image_size = 0, patch_size = 0, width = 0, feed_forward = 0, blocks = 0, heads = 0;
    int              patches_a_side = 0;
    bool             has_class = false, has_pre_norm = false, quick_gelu = false;
    float            epsilon = 0;
    float            mean[3] = {}, std[3] = {};
    std::vector<int> features;          // hidden states that are read, rising; 0 is the input of the first block
    bool             norms = false;     // the projector has norms after its layers
    std::vector<int> projector;         // widths between the layers of the projector: in, ..., D
    int              patches() const { return patches_a_side * patches_a_side; }
};

// Check all keys and tensors. Fails with MODEL_INVALID or MODEL_UNSUPPORTED.
TowerShape check_tower(const GgufHeader & header);

// The name of a layer of the projector, without ".weight".
std::string projector_name(const TowerShape & shape, size_t layer);

}  // namespace llava_edge
