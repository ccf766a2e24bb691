"""`python -m path_jax.generate` on byte-level models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.checkpoints import save_pretrained
from path_jax.data import ByteTokenizer
from path_jax.generate import Stream, main
from path_jax.interpretability import LinearRule, save_rule
from path_jax.models import DecoderLM, ModelConfig


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A model that always says "na": each of the two letters makes the other likely."""
    config = ModelConfig(257, num_layers=2, embed_dim=8, num_heads=1, mlp_dim=8, mixer="nope", scan_layers=False)
    params = DecoderLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["final_norm"]["scale"] = jnp.ones(8)
    embedding, head = np.zeros((257, 8), np.float32), np.zeros((8, 257), np.float32)
    for i, (letter, following) in enumerate(("na", "an", ".\u0100")):
        embedding[ord(letter), i] = 1
        head[i, ord(following)] = 1
    params["embed"]["embedding"], params["lm_head"]["kernel"] = jnp.asarray(embedding), jnp.asarray(head)
    path = tmp_path_factory.mktemp("generate") / "model"
    save_pretrained(path, config, params, "native")
    return str(path)


def test_continues_a_prompt(run_directory, capsys):
    main(["--checkpoint", run_directory, "--prompt", "ban", "--max-new-tokens", "5"])
    out, err = capsys.readouterr()
    assert out == "bananana\n" and "tokens/s" in err


def test_tokens_leave_early(run_directory, capsys, tmp_path):
    rule = LinearRule(jnp.zeros(1), jnp.zeros((1, 8)), jnp.ones(1))
    save_rule(tmp_path / "rule.npz", rule, [0])
    always = ["--checkpoint", run_directory, "--exit-rule", str(tmp_path / "rule.npz"), "--max-new-tokens", "9"]
    main([*always, "--prompt", "ban"])
    out, err = capsys.readouterr()
    assert out == "banananananan"[: 3 + 9] + "\n"
    assert "of 2 layers a token" in err and float(err.split()[0]) < 2
    main([*always, "--prompt", "end."])
    assert capsys.readouterr().out == "end.\n"
    save_rule(tmp_path / "none.npz", LinearRule(jnp.zeros(0), jnp.zeros((0, 8)), jnp.zeros(0)), [])
    main(
        [
            "--checkpoint",
            run_directory,
            "--prompt",
            "ban",
            "--max-new-tokens",
            "5",
            "--exit-rule",
            str(tmp_path / "none.npz"),
        ]
    )
    out, err = capsys.readouterr()
    assert out == "bananana\n" and "no exit that pays" in err


def test_ends_with_the_text(run_directory, capsys):
    main(["--checkpoint", run_directory, "--prompt", "end.", "--max-new-tokens", "50"])
    assert capsys.readouterr().out == "end.\n"


def test_continues_every_line_of_a_file(run_directory, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("ba\nend.\nbanan\n")
    main(["--checkpoint", run_directory, "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "3"])
    assert capsys.readouterr().out == "banan\nend.\nbananana\n"


def test_characters_appear_whole():
    written = []
    stream = Stream(ByteTokenizer().decode, written.append)
    for byte in "aé€".encode():
        stream.add(byte)
    stream.add(0xE2)
    stream.close()
    assert [part for part in written if part] == ["a", "é", "€", "\ufffd"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "/nowhere"], "no checkpoint /nowhere"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompts", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(run_directory, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(["--checkpoint", run_directory, *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
