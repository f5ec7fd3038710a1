#include "bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.h"
#include "half.h"
#include "json.h"
#include "sha256.h"

namespace llava_edge {

namespace {

constexpr uint64_t MAX_MANIFEST_BYTES = 2 * 1024 * 1024;
constexpr int64_t  BIG                = int64_t(1) << 31;

// A path of plain names that stays inside the bundle.
bool is_safe_path(const std::string & path) {
    bool start = true;
    for (const char c : path) {
        const bool word = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
        if (c == '/') {
            if (start) {
                return false;
            }
            start = true;
        } else if (word || (!start && (c == '.' || c == '+' || c == '-'))) {
            start = false;
        } else {
            return false;
        }
    }
    return !start;
}

bool is_sha256(const std::string & text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

BundleFile read_entry(Fields & f) {
    BundleFile file;
    file.path   = f.text("path");
    file.role   = f.text("role");
    file.sha256 = f.text("sha256");
    file.bytes  = static_cast<uint64_t>(f.integer("bytes", 0, INT64_MAX));
    f.text("type");
    f.finish();
    if (!is_safe_path(file.path)) {
        f.wrong("path", "is " + shown(file.path) + "; expected a relative path of plain names inside the bundle");
    }
    if (file.role != "llm" && file.role != "mmproj" && file.role != "vision_onnx") {
        f.wrong("role", "is " + shown(file.role) + "; expected llm, mmproj or vision_onnx");
    }
    if (!is_sha256(file.sha256)) {
        f.wrong("sha256", "is not 64 lower-case hexadecimal digits");
    }
    return file;
}

PromptFormat read_prompt(Fields f) {
    PromptFormat p;
    p.bos    = f.text("bos");
    p.system = f.text("system");
    if (!f.is_null("default_system")) {
        p.default_system = f.text("default_system");
    }
    p.user_prefix      = f.text("user_prefix");
    p.user_suffix      = f.text("user_suffix");
    p.assistant_prefix = f.text("assistant_prefix");
    p.turn_end         = f.text("turn_end");
    p.stop             = f.texts("stop");
    p.image_suffix     = f.text("image_suffix");
    p.text_prefix      = f.has("text_prefix") ? f.text("text_prefix") : "";
    f.finish();
    const size_t first = p.system.find("{system}");
    if (!p.system.empty() && (first == std::string::npos || p.system.find("{system}", first + 1) != std::string::npos)) {
        f.wrong("system", "is " + shown(p.system) + "; expected exactly one {system} in it, or an empty text");
    }
    if (p.system.empty() && !p.default_system.value_or("").empty()) {
        f.wrong("default_system", "is " + shown(*p.default_system) + ", and system has no place for it");
    }
    if (std::any_of(p.stop.begin(), p.stop.end(), [](const std::string & s) { return s.empty(); })) {
        f.wrong("stop", "holds an empty text");
    }
    return p;
}

constexpr std::array<std::pair<std::string_view, FitMode>, 4> FIT_MODES = {
    { { "pad", FitMode::Pad }, { "crop", FitMode::Crop }, { "squash", FitMode::Squash }, { "anyres", FitMode::Anyres } }
};
// Of anyres, as in llava_edge/types.py.
constexpr int     MAX_TILES       = 16;       // a side
constexpr int64_t MAX_GRID_PIXELS = 1 << 24;  // of all tiles together
constexpr size_t  MAX_GRIDS       = 128;

void read_grid(Fields & f, ImageSpec & spec) {
    if (f.has("max_tiles")) {
        spec.max_tiles = static_cast<int>(f.integer("max_tiles", 0, 65536));
    }
    const auto pairs = f.has("grid") ? f.integer_lists("grid", 1, MAX_TILES * spec.size) : std::vector<std::vector<int64_t>>();
    if (pairs.size() > MAX_GRIDS || pairs.empty() == (spec.mode == FitMode::Anyres)) {
        f.wrong("grid", format("has %zu entries; mode anyres needs 1 to %zu, the others none", pairs.size(), MAX_GRIDS));
    }
    if (spec.max_tiles != 0 && spec.mode != FitMode::Anyres) {
        f.wrong("max_tiles", format("is %d; only mode anyres has tiles", spec.max_tiles));
    }
    for (const auto & pair : pairs) {
        if (pair.size() != 2 || pair[0] % spec.size != 0 || pair[1] % spec.size != 0 || pair[0] * pair[1] > MAX_GRID_PIXELS) {
            f.wrong("grid", format("has an entry that is no width and height of 1 to %d times size, or more than %lld pixels in all", MAX_TILES,
                                   (long long) MAX_GRID_PIXELS));
        }
        spec.grid.push_back({ static_cast<int>(pair[0]), static_cast<int>(pair[1]) });
    }
}

ImageSpec read_image(Fields f) {
    ImageSpec spec;
    spec.size = static_cast<int>(f.integer("size", 1, 4096));
    f.numbers("mean", 3);  // the mmproj file has them too, and the tower reads them there
    const auto std = f.numbers("std", 3);
    if (*std::min_element(std.begin(), std.end()) <= 0) {
        f.wrong("std", "holds a value that is not above 0");
    }
    const auto color = f.integers("pad_color", 0, 255);
    if (color.size() != 3) {
        f.wrong("pad_color", format("has %zu numbers; expected 3", color.size()));
    }
    std::copy(color.begin(), color.end(), spec.pad_color.begin());
    const std::string & mode = f.text("mode");
    const auto found = std::find_if(FIT_MODES.begin(), FIT_MODES.end(), [&](const auto & known) { return known.first == mode; });
    if (found == FIT_MODES.end()) {
        f.wrong("mode", "is " + shown(mode) + "; expected pad, crop, squash or anyres");
    }
    spec.mode = found->second;
    read_grid(f, spec);
    f.finish();
    return spec;
}

VisualTokens read_visual_tokens(Fields f) {
    VisualTokens t;
    t.full            = static_cast<int>(f.integer("full", 1, 65536));
    t.standard        = static_cast<int>(f.integer("default", 1, t.full));
    const auto grid   = f.integers("grid", 1, 65536);
    const auto counts = f.integers("trained", 1, t.full);
    f.finish();
    if (grid.size() != 2 || grid[0] * grid[1] != t.full) {
        f.wrong("grid", format("is not rows x columns = full = %d", t.full));
    }
    if (std::find(counts.begin(), counts.end(), t.standard) == counts.end()) {
        f.wrong("default", format("is %d, which is none of trained", t.standard));
    }
    t.rows    = static_cast<int>(grid[0]);
    t.columns = static_cast<int>(grid[1]);
    return t;
}

std::string decode_base64(const std::string & text) {
    static const std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const size_t                  end    = std::min(text.find('='), text.size());
    std::string                   out;
    uint32_t                      bits = 0;
    for (size_t i = 0; i < end; i++) {
        const size_t digit = digits.find(text[i]);
        if (digit == std::string_view::npos) {
            fail(LLAVA_EDGE_MODEL_INVALID, "probe.embeddings is not base64");
        }
        bits = bits << 6 | static_cast<uint32_t>(digit);
        if (i % 4 != 0) {
            out += static_cast<char>(bits >> (6 - 2 * (i % 4)));
        }
    }
    if (text.size() % 4 != 0 || text.size() - end > 2 || text.find_first_not_of('=', end) != std::string::npos) {
        fail(LLAVA_EDGE_MODEL_INVALID, "probe.embeddings is not base64");
    }
    return out;
}

Probe read_probe(Fields f) {
    Probe probe;
    probe.token_rows        = f.integers("token_rows", 0, BIG);
    const std::string bytes = decode_base64(f.text("embeddings"));
    f.finish();
    if (probe.token_rows.empty() || bytes.empty() || bytes.size() % (2 * probe.token_rows.size()) != 0) {
        f.wrong("embeddings", format("has %zu bytes; expected %zu rows of float16", bytes.size(), probe.token_rows.size()));
    }
    for (size_t i = 0; i < bytes.size(); i += 2) {
        const auto low = static_cast<unsigned char>(bytes[i]), high = static_cast<unsigned char>(bytes[i + 1]);
        probe.embeddings.push_back(half_to_float(static_cast<uint16_t>(high << 8 | low)));
    }
    return probe;
}

void check_unique(const Bundle & bundle) {
    for (size_t i = 0; i < bundle.files.size(); i++) {
        for (size_t k = 0; k < i; k++) {
            if (bundle.files[i].role == bundle.files[k].role || bundle.files[i].path == bundle.files[k].path) {
                fail(LLAVA_EDGE_MODEL_INVALID, "files has two entries with the same role or path");
            }
        }
    }
    if (bundle.find("llm") == nullptr) {
        fail(LLAVA_EDGE_MODEL_INVALID, "files has no entry of role llm");
    }
}

}  // namespace

const BundleFile * Bundle::find(const char * role) const {
    for (const BundleFile & file : files) {
        if (file.role == role) {
            return &file;
        }
    }
    return nullptr;
}

std::string Bundle::path(const char * role) const {
    const BundleFile * file = find(role);
    if (file == nullptr) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s has no file of role %s, which this library needs", name.c_str(), role);
    }
    return directory + "/" + file->path;
}

Bundle parse_manifest(const std::string & text) {
    const Json json = parse_json(text);
    Fields     f(json, "");
    const auto schema = f.integer("schema", INT64_MIN, INT64_MAX);
    if (schema != 1) {
        f.wrong("schema", format("is %lld; this version of the library reads 1", (long long) schema));
    }
    Bundle bundle;
    bundle.name = f.text("name");
    for (const char * key : { "family", "license", "source" }) {
        f.text(key);
    }
    for (Fields & entry : f.objects("files")) {
        bundle.files.push_back(read_entry(entry));
    }
    check_unique(bundle);
    bundle.prompt        = read_prompt(f.object("prompt"));
    bundle.image         = read_image(f.object("image"));
    bundle.visual_tokens = read_visual_tokens(f.object("visual_tokens"));
    f.integers("feature_layers", INT64_MIN, INT64_MAX);
    for (const std::string & backend : f.texts("backends")) {
        if (backend != "onnx" && backend != "mtmd" && backend != "native") {
            f.wrong("backends", "has " + shown(backend) + "; expected some of onnx, mtmd, native");
        }
    }
    if (!f.is_null("probe")) {
        bundle.probe = read_probe(f.object("probe"));
    }
    if (!f.is_null("parity")) {
        f.object("parity");
    }
    f.finish();
    return bundle;
}

Bundle open_bundle(const std::string & directory) {
    const std::string path = directory + "/llava-edge.json";
    const std::string text = read_file(path, MAX_MANIFEST_BYTES, LLAVA_EDGE_MODEL_INVALID);
    Bundle            bundle;
    try {
        bundle = parse_manifest(text);
    } catch (const Error & error) {
        fail(error.status, "%s: %s", path.c_str(), error.what());
    }
    Sha256 hash;
    hash.add(text.data(), text.size());
    bundle.digest    = hash.digest();
    bundle.directory = directory;
    for (const BundleFile & file : bundle.files) {
        const std::string full = directory + "/" + file.path;
        const uint64_t    size = file_size(full);
        if (size != file.bytes) {
            fail(LLAVA_EDGE_MODEL_INVALID, "%s has %llu bytes; the manifest says %llu", full.c_str(),
                 (unsigned long long) size, (unsigned long long) file.bytes);
        }
    }
    return bundle;
}

uint64_t file_size(const std::string & path) {
    struct stat info;
    if (stat(path.c_str(), &info) != 0) {
        fail(errno == ENOENT || errno == ENOTDIR ? LLAVA_EDGE_NOT_FOUND : LLAVA_EDGE_IO, "can't read %s: %s",
             path.c_str(), system_text(errno).c_str());
    }
    if (!S_ISREG(info.st_mode)) {
        fail(LLAVA_EDGE_IO, "%s is not a file", path.c_str());
    }
    return static_cast<uint64_t>(info.st_size);
}

std::string read_file(const std::string & path, uint64_t limit, llava_edge_status too_long) {
    const uint64_t size = file_size(path);
    if (size > limit) {
        fail(too_long, "%s has more than %llu bytes", path.c_str(), (unsigned long long) limit);
    }
    const std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) {
        fail(LLAVA_EDGE_IO, "can't read %s: %s", path.c_str(), system_text(errno).c_str());
    }
    std::string text(size, '\0');
    if (std::fread(text.data(), 1, text.size(), file.get()) != text.size()) {
        fail(LLAVA_EDGE_IO, "can't read %s: it became shorter", path.c_str());
    }
    return text;
}

}  // namespace llava_edge
