// A session in a file: what belongs to which model, turns, embeddings, the KV cache's state, and a checksum of it all.

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <fcntl.h>
#include <unistd.h>

#include "model.h"
#include "sha256.h"

namespace llava_edge {

namespace {

constexpr std::string_view MAGIC     = "LLAVAEDGESESSION";
constexpr uint32_t         VERSION   = 1;
constexpr uint64_t         MAX_BYTES = uint64_t(1) << 40;

static_assert(sizeof(llama_token) == 4 && sizeof(float) == 4, "the file has values of four bytes");

class Writer {
  public:
    void raw(const void * data, size_t size) { bytes_.append(static_cast<const char *>(data), size); }
    void number(uint64_t value) { raw(&value, sizeof value); }
    void text(const std::string & value) { items(value.data(), value.size()); }

    template <typename T> void items(const T * data, size_t count) {
        number(count);
        raw(data, count * sizeof(T));
    }

    std::string bytes_;
};

class Reader {
  public:
    explicit Reader(std::string_view bytes) : bytes_(bytes) {}

    void raw(void * to, size_t size) {
        if (size > bytes_.size()) {
            fail(LLAVA_EDGE_STATE_INVALID, "the saved session is damaged: it ends too early");
        }
        if (size != 0) {
            std::memcpy(to, bytes_.data(), size);
        }
        bytes_.remove_prefix(size);
    }

    uint64_t number() {
        uint64_t value;
        raw(&value, sizeof value);
        return value;
    }

    template <typename T> std::vector<T> items() {
        const uint64_t count = number();
        if (count > bytes_.size() / sizeof(T)) {
            fail(LLAVA_EDGE_STATE_INVALID, "the saved session is damaged: a list is too long");
        }
        std::vector<T> values(count);
        raw(values.data(), count * sizeof(T));
        return values;
    }

    std::string text() {
        const auto characters = items<char>();
        return { characters.begin(), characters.end() };
    }

    bool done() const { return bytes_.empty(); }

  private:
    std::string_view bytes_;
};

std::string sha256(std::string_view bytes) {
    Sha256 hash;
    hash.add(bytes.data(), bytes.size());
    return hash.digest();
}

// Under a temporary name first: a kill at any moment leaves the old file or the new one.
void write_file(const std::string & path, const std::string & bytes) {
    static std::atomic<unsigned> count{ 0 };  // of files, for calls that run at once
    const std::string temporary = path + format(".%ld-%u.tmp", static_cast<long>(getpid()), count++);
    const int         file      = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    bool              written   = file >= 0;
    for (size_t at = 0; written && at < bytes.size();) {
        const ssize_t n = write(file, bytes.data() + at, std::min<size_t>(bytes.size() - at, 1 << 30));
        written         = n > 0;
        at += static_cast<size_t>(std::max<ssize_t>(n, 0));
    }
    written = written && fsync(file) == 0;
    int problem = errno;
    if (file >= 0 && close(file) != 0) {
        problem = written ? errno : problem;
        written = false;
    }
    if (written && std::rename(temporary.c_str(), path.c_str()) == 0) {
        return;
    }
    problem = written ? errno : problem;
    if (file >= 0) {
        std::remove(temporary.c_str());
    }
    fail(LLAVA_EDGE_IO, "can't write %s: %s", path.c_str(), system_text(problem).c_str());
}

}  // namespace

void Session::save(const std::string & path) {
    Writer w;
    w.raw(MAGIC.data(), MAGIC.size());
    w.number(VERSION);
    w.text(model.fingerprint());
    w.number(system_ ? 1 : 0);
    w.text(system_.value_or(""));
    const Pictures table = pictures(nullptr);
    w.number(table.size());
    for (const auto & [key, embeddings] : table) {
        w.text(key);
        w.items(embeddings->data(), embeddings->size());
    }
    w.number(turns.size());
    for (const Turn & turn : turns) {
        w.text(turn.question);
        w.text(turn.answer);
        w.number(turn.given ? 1 : 0);
        w.items(turn.ids.data(), turn.ids.size());
        w.number(turn.pictures.size());
        for (const auto & [key, embeddings] : turn.pictures) {
            w.text(key);
        }
    }
    const size_t               held  = model.cache.held(units(nullptr));
    const std::vector<uint8_t> state = held > 0 ? model.engine.save_state() : std::vector<uint8_t>();
    w.number(held);
    w.items(state.data(), state.size());
    const std::string sum = sha256(w.bytes_);
    w.raw(sum.data(), sum.size());
    write_file(path, w.bytes_);
}

void Session::load(const std::string & path) {
    const std::string bytes = read_file(path, MAX_BYTES, LLAVA_EDGE_STATE_INVALID);
    const bool        ours  = bytes.size() > MAGIC.size() + 32 && bytes.compare(0, MAGIC.size(), MAGIC) == 0;
    if (!ours || sha256(std::string_view(bytes).substr(0, bytes.size() - 32)) != bytes.substr(bytes.size() - 32)) {
        fail(LLAVA_EDGE_STATE_INVALID, "%s is no saved session, or a damaged one", path.c_str());
    }
    Reader r(std::string_view(bytes).substr(MAGIC.size(), bytes.size() - MAGIC.size() - 32));
    if (r.number() != VERSION || r.text() != model.fingerprint()) {
        fail(LLAVA_EDGE_STATE_INVALID, "%s was saved with another model, other settings or another version", path.c_str());
    }
    Session loaded(model);
    const bool        has_system = r.number() != 0;
    const std::string system     = r.text();
    if (has_system) {
        loaded.system_ = system;
    }
    Pictures       table;
    const uint64_t n_pictures = r.number();
    for (uint64_t i = 0; i < n_pictures; i++) {
        const std::string key  = r.text();
        auto              rows = std::make_shared<const std::vector<float>>(r.items<float>());
        const size_t one = size_t(model.image_tokens) * size_t(model.engine.n_embd);  // tiles add to it
        const bool   fits =
            model.bundle.image.mode == FitMode::Anyres ? rows->size() >= one && rows->size() % size_t(model.engine.n_embd) == 0 : rows->size() == one;
        if (key.empty() || !fits) {
            fail(LLAVA_EDGE_STATE_INVALID, "%s is damaged: a picture has %zu numbers", path.c_str(), rows->size());
        }
        table[key] = std::move(rows);
    }
    const uint64_t n_turns = r.number();
    for (uint64_t i = 0; i < n_turns; i++) {
        Turn turn;
        turn.question           = r.text();
        turn.answer             = r.text();
        turn.given              = r.number() != 0;
        turn.ids                = r.items<llama_token>();
        const uint64_t n_listed = r.number();
        for (uint64_t k = 0; k < n_listed; k++) {
            const auto found = table.find(r.text());
            if (found == table.end()) {
                fail(LLAVA_EDGE_STATE_INVALID, "%s is damaged: a picture is missing", path.c_str());
            }
            turn.pictures.emplace_back(found->first, found->second);
        }
        loaded.turns.push_back(std::move(turn));
    }
    const uint64_t held  = r.number();
    const auto     state = r.items<uint8_t>();
    auto           all   = loaded.units(nullptr);
    if (!r.done() || held > all.size()) {
        fail(LLAVA_EDGE_STATE_INVALID, "%s is damaged", path.c_str());
    }
    if (held > 0) {
        all.resize(held);
        model.cache.restore(all, table, state);
    }
    for (const auto & [key, embeddings] : table) {
        model.remember(key, embeddings);
    }
    reset();
    system_    = loaded.system_;
    turns      = std::move(loaded.turns);
    turn_count = static_cast<int>(turns.size());
    answer     = {};
    tokens     = held > 0 ? model.cache.tokens() : 0;
}

}  // namespace llava_edge
