// A bundle: a directory with everything that is needed to run a model, described by its manifest.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llava_edge.h"

namespace llava_edge {

struct BundleFile {
    std::string path, role, sha256;
    uint64_t    bytes = 0;
};

// The text around a conversation's turns.
struct PromptFormat {
    std::string                bos, system, user_prefix, user_suffix, assistant_prefix, turn_end, image_suffix, text_prefix;
    std::optional<std::string> default_system;
    std::vector<std::string>   stop;
};

enum class FitMode { Pad, Crop, Squash, Anyres };

struct Size {
    int width = 0, height = 0;
};

// How a vision tower wants its pictures.
struct ImageSpec {
    int                    size = 0;
    FitMode                mode = FitMode::Pad;
    std::array<uint8_t, 3> pad_color{};
    std::vector<Size>      grid;           // Anyres: to one of these a picture is fitted and cut into tiles
    int                    max_tiles = 0;  // Anyres: more than about so many tiles' tokens are scaled down; 0 never does
};

struct VisualTokens {
    int full = 0, rows = 0, columns = 0, standard = 0;
};

// Rows of the embeddings that the reference gives for the probe picture.
struct Probe {
    std::vector<int64_t> token_rows;
    std::vector<float>   embeddings;  // [rows, width]
};

struct Bundle {
    std::string             directory, name;
    std::string             digest;  // of the manifest, which holds the files' own
    std::vector<BundleFile> files;
    PromptFormat            prompt;
    ImageSpec               image;
    VisualTokens            visual_tokens;
    std::optional<Probe>    probe;

    // The file of a role; null if the bundle has none.
    const BundleFile * find(const char * role) const;
    // Its path; fails (MODEL_UNSUPPORTED) if the bundle has none.
    std::string path(const char * role) const;
};

// Read and check the manifest, and that every file is there with its size.
Bundle open_bundle(const std::string & directory);

// Read a manifest's text.
Bundle parse_manifest(const std::string & text);

// A whole small file; fails if it has more than `limit` bytes.
std::string read_file(const std::string & path, uint64_t limit, llava_edge_status too_long);

// Bytes of a regular file; fails if there is none.
uint64_t file_size(const std::string & path);

}  // namespace llava_edge
