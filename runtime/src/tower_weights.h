// The weights of a tower in memory.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ggml_handles.h"
#include "q8_linear.h"
#include "tower_file.h"

namespace llava_edge {

struct Linear {
    ggml_tensor *             weight = nullptr, *bias = nullptr;  // [in, out], [out]
    std::unique_ptr<Q8Linear> q8     = nullptr;                   // in place of the weight
};

struct Norm {
    ggml_tensor *weight = nullptr, *bias = nullptr;
};

struct Block {
    Norm                norm1, norm2;
    std::vector<Linear> qkv;  // one for all three, or one for each where their types differ
    Linear              out, up, down;
};

class TowerWeights {
  public:
    // Read everything that the shape tells into memory of the backend's device. With `repack`, into buffers whose order
    // suits the CPU's kernels, where ggml has such for a tensor's type.
    void load(const GgufHeader & header, const TowerShape & shape, ggml_backend_t backend, bool repack);

    Linear              patch;
    ggml_tensor *       class_token = nullptr;
    ggml_tensor *       positions   = nullptr;
    Norm                pre_norm;
    std::vector<Block>  blocks;
    std::vector<Linear> projector;
    std::vector<Norm>   projector_norms;
    std::vector<float>  newline;  // on no device: it goes to the language model as it is

  private:
    struct Part {  // a tensor, and those of the file that it is put together from
        ggml_tensor *            to;  // null: of a Q8Linear
        std::vector<std::string> names;
        size_t                   each;  // bytes of one of them
    };

    ggml_tensor *       vector(const std::string & name);
    Norm                norm(const std::string & name);
    Linear              linear(const std::vector<std::string> & names);
    std::vector<uint8_t> read_bytes(FILE * file, const Part & part, uint32_t * type);
    std::vector<Linear> merged(const std::vector<std::string> & names);
    void                read(FILE * file, const Part & part);

    const GgufHeader *   header_ = nullptr;
    Context              plain_, repacked_;
    Buffer               plain_buffer_, repacked_buffer_;
    std::vector<Part>    parts_;
    FILE *               file_ = nullptr;
    bool                 on_cpu_ = false;
    std::function<bool(ggml_type, int64_t, int64_t)> can_repack_;
};

}  // namespace llava_edge
