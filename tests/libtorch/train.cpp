// A program without Python: trains a model that was scripted and saved with its optimizer, or makes an optimizer
// itself.
//
//   train scripted MODEL INPUTS STEPS OUT   calls the module's train_step and saves the module
//   train direct   MODEL INPUTS STEPS OUT   builds an optimizer of the module's params; saves params and state
//   train misuse                            prints what each misuse throws, a line each
#include <adamw_ext/adamw.h>
#include <torch/script.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>

namespace {

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}}).toTensor();
}

void write(const std::string& path, const c10::IValue& value) {
  const std::vector<char> bytes = torch::pickle_save(value);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

void train_scripted(torch::jit::Module model, const at::Tensor& inputs, int steps, const std::string& out) {
  for (int i = 0; i < steps; ++i) model.run_method("train_step", inputs);
  model.save(out);
}

void train_directly(torch::jit::Module model, const at::Tensor& inputs, int steps, const std::string& out) {
  std::vector<at::Tensor> params;
  for (const at::Tensor& param : model.parameters()) params.push_back(param);
  adamw_ext::AdamWOptions options;
  options.lr = 0.1;
  options.amsgrad = true;
  options.max_grad_norm = 0.5;
  adamw_ext::AdamW optimizer(params, options);
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    model.forward({inputs}).toTensor().square().mean().backward();
    optimizer.step();
    options.lr *= 0.5;
    optimizer.set_options(0, options);
  }
  auto saved = c10::ivalue::Tuple::create(std::vector<c10::IValue>(params.begin(), params.end()));
  write(out, std::make_tuple(saved, optimizer.state()));
}

template <class Misuse>
void show_misuse(const Misuse& misuse) {
  try {
    misuse();
    std::cout << "nothing was thrown\n";
  } catch (const c10::Error& error) {
    std::cout << error.what_without_backtrace() << "\n";
  }
}

void show_misuses() {
  using adamw_ext::AdamW;
  const auto param = [] { return torch::ones({3}).requires_grad_(); };
  show_misuse([&] { AdamW({param(), at::Tensor()}); });
  show_misuse([&] { AdamW({torch::ones({3}, torch::kInt)}); });
  show_misuse([&] { AdamW({param()}, adamw_ext::AdamWOptions{/*lr=*/-1.0}); });
  show_misuse([&] { AdamW({param()}).step(std::vector<at::Tensor>{}); });
  show_misuse([&] { AdamW({param()}).step(std::vector<at::Tensor>{torch::ones({4})}); });
  show_misuse([&] { AdamW({param()}).step(std::vector<at::Tensor>{torch::ones({3}, torch::kMeta)}); });
  show_misuse([&] { AdamW({torch::ones({3}, torch::kMeta)}).step(std::vector<at::Tensor>{torch::ones({3})}); });
  show_misuse([&] {
    const at::Tensor freed = param();
    AdamW optimizer({freed});
    optimizer.step(std::vector<at::Tensor>{torch::ones({3})});
    freed.storage().unsafeGetStorageImpl()->set_nbytes(0);
    optimizer.step(std::vector<at::Tensor>{torch::ones({3})});
  });
  show_misuse([&] { AdamW({param()}).options(1); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "misuse") {
    show_misuses();
    return 0;
  }
  if (argc != 6) return 2;
  const auto train = mode == "scripted" ? train_scripted : train_directly;
  train(torch::jit::load(argv[2]), read_tensor(argv[3]), std::stoi(argv[4]), argv[5]);
  return 0;
}
