"""A question about a video, answered by Qwen2.5-VL with pyramid sparse attention in the prefill.

    python examples/qwen2_5_vl.py film.mp4 "Who opens the door?"
    python examples/qwen2_5_vl.py --tiny

The first needs a GPU, the weights from the hub (7B: 17 GB) and a video reader that transformers knows, such as
torchcodec or av. The second runs a random model on noise, to show that the parts fit.
"""

import argparse
import time

import torch
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from psa_integrations import register_pyramid_attention

VIDEO_TOKEN = 101


def tiny_model() -> Qwen2_5_VLForConditionalGeneration:
    """A random text model of 2 layers with a vision tower to match."""
    text = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    special = {"image_token_id": 100, "video_token_id": VIDEO_TOKEN}
    special |= {"vision_start_token_id": 102, "vision_end_token_id": 103}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    ).eval()


def tiny_inputs(frames: int = 8, height: int = 32, width: int = 40) -> dict[str, torch.Tensor]:
    """Noise for a video of so many patches, and a question of three tokens."""
    tokens = frames * height * width // 4
    ids = torch.tensor([[1, 102, *[VIDEO_TOKEN] * tokens, 103, 5, 6, 7]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO_TOKEN) * 2,
        "pixel_values_videos": torch.randn(frames * height * width, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a file or an address")
    parser.add_argument("question", nargs="?", default="Describe this video.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct")
    parser.add_argument("--preset", default="Qwen2.5-VL_7b/psa_balanced")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second that the model sees")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="a random model on noise, on the CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and options.video is None:
        parser.error("a video is needed, or --tiny")

    psa = register_pyramid_attention(options.preset)
    if options.tiny:
        model, inputs, processor = tiny_model(), tiny_inputs(), None
        model.set_attn_implementation({"text_config": "psa"})
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            options.model, dtype=torch.bfloat16, device_map="cuda", attn_implementation={"text_config": "psa"}
        )
        processor = AutoProcessor.from_pretrained(options.model)
        content = [{"type": "video", "video": options.video}, {"type": "text", "text": options.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"fps": options.fps},
        ).to(model.device)

    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    prompt = inputs["input_ids"].shape[1]
    answer = tokens[0, prompt:]
    print(answer.tolist() if processor is None else processor.decode(answer, skip_special_tokens=True))
    print(f"{prompt} tokens of prompt, density of their attention {psa.stats().density:.2f}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
