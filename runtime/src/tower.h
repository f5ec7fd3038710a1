// The vision tower: CLIP, SigLIP or DINOv2 with a linear or MLP projector, as a ggml graph of its own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "image.h"
#include "stop_flag.h"

namespace llava_edge {

class Tower {
  public:
    // Fails with MODEL_INVALID, MODEL_UNSUPPORTED, OUT_OF_MEMORY. `stop` may end an evaluation; null is never.
    Tower(const std::string & path, int n_threads, bool use_gpu, const StopFlag * stop = nullptr);
    ~Tower();
    Tower(const Tower &)             = delete;
    Tower & operator=(const Tower &) = delete;

    int image_size() const;
    int n_tokens() const;
    int n_embd() const;

    // What ends a row of tiles [n_embd]; empty where the file has none.
    const std::vector<float> & newline() const;

    // Embeddings [n_tokens, n_embd] of a picture of the tower's size.
    std::vector<float> encode(const uint8_t * pixels, size_t stride);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// Averages square cells of a grid of embeddings: [rows * columns, width] to [count, width], as NumPy sums them.
std::vector<float> pool(const std::vector<float> & embeddings, int rows, int columns, int count);

// The side of the squares of which `count` cover the grid; 0 if pooling can't give this count.
int pooled_cell(int rows, int columns, int count);

// Mean cosine of the probe's rows to what they should be; 0 where nothing can be compared.
double probe_cosine(const Probe & probe, const std::vector<float> & embeddings, int width);

}  // namespace llava_edge
