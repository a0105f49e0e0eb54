// Draws a picture with a bundle. It was written from docs/bundle.md alone, and is one file on purpose.
//
// It needs the C++ package of ONNX Runtime, JSON for Modern C++ and ICU (Debian: nlohmann-json3-dev, libicu-dev):
//
//   c++ -std=c++17 -O2 -ffp-contract=off -I ORT/include generate.cpp -o generate -L ORT/lib -lonnxruntime -licuuc
//   ./generate --bundle DIR --seed 1 --out heart.bmp "a red heart"
//
// With -ffp-contract=off, the noise has the same bits on all processors.
// It trusts the bundle: it compares neither sha256 nor the locations of external data.

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>
#include <unicode/locid.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

using Json = nlohmann::json;
using Text = icu::UnicodeString;
using Path = std::filesystem::path;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Json read_json(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error("cannot read " + path.string());
  return Json::parse(file);
}

// ---------------------------------------------------------------------------------------------------- tokenizer.json

std::string utf8(const Text& text) {
  std::string bytes;
  text.toUTF8String(bytes);
  return bytes;
}

bool is_space(UChar32 c) { return u_isUWhiteSpace(c); }

// Unicode's punctuation, and all ASCII characters that are neither letters, digits, spaces nor controls.
bool is_punctuation(UChar32 c) { return u_ispunct(c) || (c > 32 && c < 127 && !u_isalnum(c)); }

bool is_chinese(UChar32 c) {
  static const std::array<std::array<UChar32, 2>, 8> blocks{{{0x4E00, 0x9FFF},
                                                             {0x3400, 0x4DBF},
                                                             {0x20000, 0x2A6DF},
                                                             {0x2A700, 0x2B73F},
                                                             {0x2B740, 0x2B81F},
                                                             {0x2B920, 0x2CEAF},
                                                             {0xF900, 0xFAFF},
                                                             {0x2F800, 0x2FA1F}}};
  return std::any_of(blocks.begin(), blocks.end(), [c](const auto& block) { return block[0] <= c && c <= block[1]; });
}

// Calls `visit` with every code point of a text.
template <typename Visit>
void each(const Text& text, Visit visit) {
  for (int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) visit(text.char32At(i));
}

// Lowers each code point alone: an s at the end of a Greek word is like any other.
Text lower(const Text& text) {
  Text lowered;
  each(text, [&](UChar32 c) { lowered += Text(c).toLower(icu::Locale::getRoot()); });
  return lowered;
}

// What \w of regular expressions matches.
bool is_word(UChar32 c) {
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL) ||
         (U_MASK(u_charType(c)) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

// The parts of tokenizer.json of the default model (BERT's), and of the small bundle that docs/bundle.md shows.
class Tokenizer {
 public:
  explicit Tokenizer(Json file) : file_(std::move(file)) {
    require("/normalizer/type", {"BertNormalizer", "Lowercase"});
    require("/pre_tokenizer/type", {"BertPreTokenizer", "Whitespace"});
    require("/model/type", {"WordPiece", "WordLevel"});
    require("/post_processor/type", {"TemplateProcessing"});
    require("/truncation/direction", {"Right"});
    require("/padding/direction", {"Right"});
    for (const auto& [word, id] : file_["model"]["vocab"].items()) vocabulary_[word] = id;
  }

  // The ids of a prompt with special tokens, padded to `length`; `mask` receives 1 for each id that is no padding.
  std::vector<int64_t> encode(const std::string& prompt, size_t length, std::vector<int64_t>& mask) const {
    const std::vector<int64_t> own = ids_of(Text::fromUTF8(prompt));
    const Json& post = file_["post_processor"];
    size_t special = 0;
    for (const Json& part : post["single"])
      if (part.contains("SpecialToken")) special += special_ids(part).size();
    std::vector<int64_t> ids;
    for (const Json& part : post["single"]) {
      if (part.contains("SpecialToken")) {
        for (const Json& id : special_ids(part)) ids.push_back(id);
      } else {
        ids.insert(ids.end(), own.begin(), own.begin() + std::min(own.size(), length - special));
      }
    }
    mask.assign(ids.size(), 1);
    mask.resize(length, 0);
    ids.resize(length, file_["padding"]["pad_id"].get<int64_t>());
    return ids;
  }

 private:
  Json file_;
  std::map<std::string, int64_t> vocabulary_;

  void require(const char* field, const std::vector<std::string>& known) const {
    const Json& value = file_.value(Json::json_pointer(field), Json());
    if (!value.is_string() || std::find(known.begin(), known.end(), value) == known.end())
      throw Error(std::string("tokenizer.json: this example has no ") + field + " " + value.dump());
  }

  const Json& special_ids(const Json& part) const {
    return file_["post_processor"]["special_tokens"][part["SpecialToken"]["id"].get<std::string>()]["ids"];
  }

  // Cuts a text at added tokens such as [MASK], which are found before the text is normalized.
  std::vector<int64_t> ids_of(const Text& text) const {
    std::vector<int64_t> ids;
    Text between;
    for (int32_t i = 0; i < text.length();) {
      const Json* added = nullptr;
      int32_t length = 0;
      for (const Json& token : file_["added_tokens"]) {
        const Text content = Text::fromUTF8(token["content"].get<std::string>());
        if (content.length() > length && text.compare(i, content.length(), content) == 0) {
          added = &token;
          length = content.length();
        }
      }
      if (added == nullptr) {
        between += text[i++];
        continue;
      }
      append_words(between, ids);
      between.remove();
      ids.push_back((*added)["id"]);
      i += length;
    }
    append_words(between, ids);
    return ids;
  }

  void append_words(const Text& text, std::vector<int64_t>& ids) const {
    const bool bert = file_["pre_tokenizer"]["type"] == "BertPreTokenizer";
    Text word;
    int kind = 0;  // of the characters of `word`
    const auto finish = [&] {
      if (!word.isEmpty()) append_ids(word, ids);
      word.remove();
    };
    each(normalized(text), [&](UChar32 c) {
      if (is_space(c)) return finish();
      const bool alone = bert && is_punctuation(c);
      const int kind_of_c = bert || is_word(c) ? 1 : 2;
      if (alone || kind_of_c != kind) finish();
      word += c;
      kind = kind_of_c;
      if (alone) finish();
    });
    finish();
  }

  Text normalized(const Text& text) const {
    const Json& normalizer = file_["normalizer"];
    if (normalizer["type"] == "Lowercase") return lower(text);
    Text clean;
    each(text, [&](UChar32 c) {
      const int8_t type = u_charType(c);
      const bool line = c == '\t' || c == '\n' || c == '\r';
      const bool drop = c == 0 || c == 0xFFFD || type == U_CONTROL_CHAR || type == U_FORMAT_CHAR ||
                        type == U_PRIVATE_USE_CHAR;
      if (normalizer["clean_text"] && !line && drop) return;
      const bool chinese = normalizer["handle_chinese_chars"] && is_chinese(c);
      if (chinese) clean += u' ';
      clean += normalizer["clean_text"] && is_space(c) ? UChar32(' ') : c;
      if (chinese) clean += u' ';
    });
    const bool lowercase = normalizer["lowercase"];
    const Json& strip = normalizer["strip_accents"];  // null means: as `lowercase`
    if (strip.is_null() ? lowercase : strip.get<bool>()) {
      UErrorCode code = U_ZERO_ERROR;
      const Text decomposed = icu::Normalizer2::getNFDInstance(code)->normalize(clean, code);
      if (U_FAILURE(code)) throw Error(std::string("ICU: ") + u_errorName(code));
      clean.remove();
      each(decomposed, [&](UChar32 c) {
        if (u_charType(c) != U_NON_SPACING_MARK) clean += c;
      });
    }
    return lowercase ? lower(clean) : clean;
  }

  // WordLevel: the word's id. WordPiece: the longest pieces from the left, or the unknown token for the whole word.
  void append_ids(const Text& word, std::vector<int64_t>& ids) const {
    const Json& model = file_["model"];
    const int64_t unknown = vocabulary_.at(model["unk_token"]);
    if (model["type"] == "WordLevel") {
      const auto found = vocabulary_.find(utf8(word));
      ids.push_back(found == vocabulary_.end() ? unknown : found->second);
      return;
    }
    std::vector<int64_t> pieces;
    const bool too_long = word.countChar32() > model["max_input_chars_per_word"].get<int32_t>();
    for (int32_t start = 0; start < word.length();) {
      const std::string prefix = start == 0 ? "" : model["continuing_subword_prefix"].get<std::string>();
      int32_t end = too_long ? start : word.length();
      auto found = vocabulary_.end();
      for (; end > start; end = word.moveIndex32(end, -1)) {
        found = vocabulary_.find(prefix + utf8(word.tempSubStringBetween(start, end)));
        if (found != vocabulary_.end()) break;
      }
      if (found == vocabulary_.end()) {
        pieces.assign(1, unknown);
        break;
      }
      pieces.push_back(found->second);
      start = end;
    }
    ids.insert(ids.end(), pieces.begin(), pieces.end());
  }
};

// -------------------------------------------------------------------------------------------------------------- styles

// The words of a text in lower case, with a space before and after each.
Text spaced(const std::string& text) {
  Text words = " ";
  each(Text::fromUTF8(text).toLower(icu::Locale::getRoot()), [&](UChar32 c) {
    if (c == '_' || U_MASK(u_charType(c)) & (U_GC_L_MASK | U_GC_N_MASK)) words += c;
    else if (!words.endsWith(" ")) words += ' ';
  });
  return words.endsWith(" ") ? words : words + " ";
}

// The prompt that is drawn: if it names no style, the seed's style is added.
std::string in_style(const Json& manifest, const std::string& prompt, uint64_t seed) {
  const Json styles = manifest.value("/prompts/styles"_json_pointer, Json::array());
  const Text words = spaced(prompt);
  const auto named = [&](const std::string& name) { return words.indexOf(spaced(name)) >= 0; };
  if (styles.empty() || words == " " || named("style") || std::any_of(styles.begin(), styles.end(), named))
    return prompt;
  return prompt + ", " + styles[seed % styles.size()].get<std::string>() + " style";
}

// -------------------------------------------------------------------------------------------------------------- noise

// The first two words of Philox 4x32-10.
std::array<uint32_t, 2> philox(uint64_t seed, uint32_t element) {
  std::array<uint32_t, 4> c{0, 0, element, 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(second >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(first)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {c[0], c[1]};
}

// Box-Muller in float32. The logarithm and the sine are those of float64, rounded, which are equal everywhere.
std::vector<float> noise(uint64_t seed, size_t count) {
  const float scale = 0x1p-32f, half = 0x1p-33f, two_pi = static_cast<float>(2 * std::acos(-1.0));
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    const auto [g0, g1] = philox(seed, static_cast<uint32_t>(i));
    const float u = static_cast<float>(g0) * scale + half;
    const float v = static_cast<float>(g1) * (scale * two_pi) + half * two_pi;
    const float logarithm = static_cast<float>(std::log(static_cast<double>(u)));
    const float sine = static_cast<float>(std::sin(static_cast<double>(v)));
    values[i] = std::sqrt(-2 * logarithm) * sine;
  }
  return values;
}

// ------------------------------------------------------------------------------------------------------------- graphs

using Tensors = std::map<std::string, Ort::Value>;

template <typename T>
Ort::Value tensor(std::vector<T>& values, const std::vector<int64_t>& shape) {
  static const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

// Runs a graph on those of `known` that it has as inputs, and adds its outputs to `known`.
void run(const Ort::Env& env, const Path& path, Tensors& known) {
  Ort::Session session(env, path.c_str(), Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  std::vector<const char*> inputs, outputs;
  std::vector<OrtValue*> given;
  const size_t input_count = session.GetInputCount(), output_count = session.GetOutputCount();
  for (size_t i = 0; i < input_count; ++i) names.push_back(session.GetInputNameAllocated(i, allocator).get());
  for (size_t i = 0; i < output_count; ++i) names.push_back(session.GetOutputNameAllocated(i, allocator).get());
  for (size_t i = 0; i < names.size(); ++i) (i < input_count ? inputs : outputs).push_back(names[i].c_str());
  for (const char* name : inputs) {
    const auto found = known.find(name);
    if (found == known.end()) throw Error(path.string() + " has an unknown input " + name);
    given.push_back(found->second);
  }
  std::vector<OrtValue*> made(output_count, nullptr);
  Ort::ThrowOnError(Ort::GetApi().Run(session, nullptr, inputs.data(), given.data(), given.size(), outputs.data(),
                                      outputs.size(), made.data()));
  for (size_t i = 0; i < output_count; ++i) known.insert_or_assign(outputs[i], Ort::Value(made[i]));
}

// ------------------------------------------------------------------------------------------------------------ picture

struct Options {
  Path bundle, out = "picture.bmp", values;
  std::string prompt;
  uint64_t seed = 0;
};

template <typename T>
void write(std::ofstream& file, const T* values, size_t count) {
  file.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(T)));
}

// image (3, height, width) in [-1, 1] => a BMP file, whose rows go upwards and whose pixels are blue, green, red.
void write_bmp(const Path& path, const float* image, uint32_t height, uint32_t width) {
  const uint32_t row = (3 * width + 3) / 4 * 4;
  const std::array<uint32_t, 13> header{54 + row * height, 0, 54, 40, width, height, 1 | 24 << 16, 0, row * height};
  std::ofstream file(path, std::ios::binary);
  file << "BM";
  write(file, header.data(), header.size());
  std::vector<uint8_t> pixels(row);
  for (uint32_t y = height; y-- > 0;) {
    for (uint32_t i = 0; i < 3 * width; ++i) {
      const float value = image[((2 - i % 3) * height + y) * width + i / 3];
      pixels[i] = static_cast<uint8_t>(std::nearbyint(255 * std::clamp((value + 1) / 2, 0.0f, 1.0f)));
    }
    write(file, pixels.data(), row);
  }
  if (!file.flush()) throw Error("cannot write " + path.string());
}

void draw(const Options& options) {
  const Json manifest = read_json(options.bundle / "bundle.json");
  if (manifest.value("format", 0) != 1) throw Error("bundle.json: expected \"format\": 1");
  if (manifest.contains("safety_checker"))
    std::cerr << "generate: warning: this example does not run the safety checker of the bundle\n";
  const Json& variants = manifest["variants"];
  const Json& files = variants.contains("cpu") ? variants["cpu"] : variants.at("portable");
  const auto graph = [&](const char* name) { return options.bundle / files[name].get<std::string>(); };

  const int64_t length = manifest["text_length"], channels = manifest["latent_channels"];
  const int64_t pixels = manifest["pixels_per_latent"];
  const int64_t height = manifest["default_height"].get<int64_t>() / pixels;
  const int64_t width = manifest["default_width"].get<int64_t>() / pixels;
  const Json& schedule = manifest["schedules"][std::to_string(manifest["default_steps"].get<int>())];
  const std::vector<int64_t> all = manifest["decoder_timesteps"];
  std::vector<float> step_weights = schedule["step_weights"];
  std::vector<int64_t> step_indices;
  for (const int64_t t : schedule["timesteps"])
    step_indices.push_back(std::find(all.begin(), all.end(), t) - all.begin());
  const int64_t steps = static_cast<int64_t>(step_indices.size());

  std::vector<int64_t> mask;
  const std::string prompt = in_style(manifest, options.prompt, options.seed);
  std::vector<int64_t> ids = Tokenizer(read_json(options.bundle / "tokenizer.json")).encode(prompt, length, mask);
  std::vector<float> z = noise(options.seed, channels * height * width);
  const std::vector<float> z_T = z;

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "generate");
  Tensors known;
  known.emplace("input_ids", tensor(ids, {1, length}));
  known.emplace("attention_mask", tensor(mask, {1, length}));
  known.emplace("latents", tensor(z, {1, channels, height, width}));  // shares the memory of z
  known.emplace("step_index", tensor(step_indices, {steps}));
  known.emplace("step_weight", tensor(step_weights, {steps}));
  run(env, graph("text_encoder"), known);
  run(env, graph("unet_encoder"), known);
  run(env, graph("unet_decoder"), known);
  const float* contribution = known.at("contribution").GetTensorData<float>();
  const float noise_weight = schedule["noise_weight"];
  for (size_t i = 0; i < z.size(); ++i) z[i] = noise_weight * z[i] + contribution[i];
  run(env, graph("vae_decoder"), known);
  const auto shape = known.at("image").GetTensorTypeAndShapeInfo().GetShape();
  write_bmp(options.out, known.at("image").GetTensorData<float>(), shape[2], shape[3]);

  if (!options.values.empty()) {  // L ids, z_T and z_0, for a comparison with other readers
    std::ofstream file(options.values, std::ios::binary);
    write(file, ids.data(), ids.size());
    write(file, z_T.data(), z_T.size());
    write(file, z.data(), z.size());
    if (!file.flush()) throw Error("cannot write " + options.values.string());
  }
}

uint64_t whole_number(const std::string& text) {
  uint64_t value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size())
    throw Error("--seed: expected an integer in [0, 2**64), got " + text);
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string flag = arguments[i];
    if (flag.rfind("--", 0) != 0) {
      options.prompt = flag;
      continue;
    }
    if (++i == count) throw Error(flag + " needs a value");
    if (flag == "--bundle") options.bundle = arguments[i];
    else if (flag == "--out") options.out = arguments[i];
    else if (flag == "--values") options.values = arguments[i];
    else if (flag == "--seed") options.seed = whole_number(arguments[i]);
    else throw Error("unknown flag " + flag + "; known are --bundle, --out, --seed and --values");
  }
  if (options.bundle.empty()) throw Error("usage: generate --bundle DIR [--seed N] [--out FILE] [--values FILE] PROMPT");
  return options;
}

int main(int count, char** arguments) {
  try {
    draw(parse(count, arguments));
  } catch (const std::exception& error) {
    std::cerr << "generate: error: " << error.what() << "\n";
    return 2;
  }
  return EXIT_SUCCESS;
}
