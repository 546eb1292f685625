"""Scores by an encoder and by the subject model: known effects are found, controls stand beside, other caches refused."""

import json
import shutil
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from sae_italian.autointerp.examples import promoted_tokens
from sae_italian.autointerp.run import N_SEGMENTS, score_with_models
from sae_italian.autointerp.scorers.subject import (
    EncoderJudge,
    SubjectJudge,
    adding,
    strength_of,
    subject_judge,
    written_after,
)
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.summary import means, means_table
from sae_italian.autointerp.work import cache_identity
from sae_italian.base.errors import UsageError
from sae_italian.cache import FeatureCache
from sae_italian.models.activations import logits_with_replacement
from sae_italian.saes import load_sae
from tests.autointerp.conftest import N_TOKENS, scores_of
from tests.autointerp.test_scorers import Copier
from tests.test_cli import run


def bag_of_letters(texts):
    return np.array([[text.count("a"), text.count("o") + 1] for text in texts])


def quoting(store, path, planted, mini):
    """A copy of the store in which an explainer quotes the token of each planted latent; their latents."""
    path = shutil.copy(store, path)
    said = {}
    for latent in range(N_TOKENS):
        word = mini.tokenizer.decode([int(planted.tokens[planted.latent(latent).position[0]])]).strip()
        said[latent] = Explanation(latent, "quotes", "ok", " ".join([word] * 4), "", None)
    with Store(path, {}) as opened:
        opened.add_explanations(said.values())
    return path


@pytest.fixture(scope="module")
def scored(planted, mini, store, tmp_path_factory):
    """Quotes scored by a model that expects again what it has read, and whose state is the share of each token."""
    path = quoting(store, tmp_path_factory.mktemp("quotes") / "store", planted, mini)
    copier = Copier(len(mini.tokenizer))
    tokens = [int(planted.tokens[planted.latent(latent).position[0]]) for latent in range(N_TOKENS)]
    rest = [0] * (planted.manifest.d_sae - N_TOKENS)
    directions = torch.nn.functional.one_hot(torch.tensor(tokens + rest), copier.vocab).float()
    strings = mini.tokenizer.convert_ids_to_tokens(range(len(mini.tokenizer)))
    subject = SubjectJudge(copier, mini.tokenizer, directions, partial(promoted_tokens, planted, strings))
    for _ in range(2):  # the second time there is nothing left to do
        judges = (EncoderJudge(bag_of_letters), subject)
        score_with_models(planted, mini.tokenizer, path, judges, latents=6, explainer="quotes")
    return path


def test_a_true_explanation_beats_another_latents_and_an_empty_one(scored):
    rows = {(row["scorer"], row["negatives"]): row for row in means(scored, "quotes", ("encoder", "subject"))}
    surprise, effect = rows["surprisal", "random"], rows["intervention", "none"]
    assert surprise["n"] == effect["n"] == 6
    assert surprise["value"] > 0.75 and surprise["over_shuffled"]["lo"] > 0.05 and surprise["over_empty"]["lo"] > 0
    assert abs(surprise["shuffled"]["value"] - 0.5) < 0.15
    for row, control in product((surprise, effect), ("shuffled", "empty")):  # all six latents have both
        over = row[f"over_{control}"]
        assert over["lo"] < over["value"] < over["hi"] and row["lo"] < row["value"] < row["hi"]
        assert over["value"] == pytest.approx(row["value"] - row[control]["value"])
    assert effect["over_shuffled"]["lo"] > 0.1 and effect["over_empty"]["lo"] > 0
    assert ("intervention", "promoted") in rows and ("embedding", "random") in rows
    lines = means_table(list(rows.values())).splitlines()
    assert len(lines) == len(rows) + 2 and any("promoted tokens" in line for line in lines)


def test_each_score_has_its_controls_on_the_same_examples(scored):
    with Store(scored, {}) as opened:
        for latent in opened.scored("quotes", "subject"):
            mine = [row for row in scores_of(opened, latent) if row["judge"] == "subject"]
            by_control = {
                control: {
                    (r["scorer"], r["negatives"]): (r["n_positive"], r["n_negative"])
                    for r in mine
                    if r["control"] == control and r["negatives"] != "promoted"
                }
                for control in ("", "shuffled", "empty")
            }
            assert by_control[""] == by_control["shuffled"] == by_control["empty"] != {}
            n = by_control[""]["surprisal", "random"]
            assert n[0] == n[1] > N_SEGMENTS / 2


def test_a_direction_of_the_real_model_makes_it_write_the_word(mini, planted):
    """The mini model and a direction whose effect is known, the unembedding of a word: at the strength that is searched
    the divergence is as wanted and the word is written, clean text has it rarely. (That the mini model then also says so
    when asked is not to be expected: it cannot follow a question.)"""

    def forward(tokens, replace=None):
        return logits_with_replacement(mini, tokens, "blocks.2.hook_resid_post", replace or (lambda x: x))

    rows = planted.tokens.reshape(-1, planted.manifest.context_size)[:12, :16].astype(np.int64)
    tokens = torch.from_numpy(rows)
    for word in ("dice", "anni", "casa"):
        (token,) = mini.tokenizer(word, add_special_tokens=False)["input_ids"]
        direction = mini.get_output_embeddings().weight[token].detach()
        strength, reached = strength_of(forward, tokens, direction, 2.0)
        assert reached == pytest.approx(2.0, rel=0.1)
        changed, clean = (written_after(forward, tokens, r) for r in (adding(direction, strength), None))
        shares = [float((written == token).any(dim=1).float().mean()) for written in (changed, clean)]
        assert shares[0] > 0.35 and shares[1] < 0.2


def test_an_intervention_says_how_strong_it_was(scored):
    with Store(scored, {}) as opened:
        (latent, *_) = opened.scored("quotes", "subject")
        rows = [row for row in scores_of(opened, latent) if (row["scorer"], row["control"]) == ("intervention", "")]
    found = {row["metric"]: row["value"] for row in rows}
    assert set(found) == {"log_probability_gain", "strength", "divergence"} and found["strength"] > 0


def test_what_does_not_fit_the_context_fails_and_is_no_end(planted, mini, store, tmp_path):
    path = shutil.copy(store, tmp_path / "store")
    judge = SubjectJudge(Copier(len(mini.tokenizer)), mini.tokenizer, context=20)
    score_with_models(planted, mini.tokenizer, path, [judge], latents=2)
    with Store(path, {}) as opened:
        (latent, *_) = opened.scored("rules", "subject")
        rows = [row for row in scores_of(opened, latent) if row["judge"] == "subject"]
    assert rows and all(row["value"] is None and row["n_failed"] > 0 for row in rows)
    summary = means(path, "rules", ["subject"])
    assert summary[0]["n_failed"] == 2 and all((row["n"], row["value"]) == (0, None) for row in summary)
    assert "| - | - | - | - | 0 (2 could not be scored) |" in means_table(summary)


def test_the_subject_is_the_caches_model_with_its_whole_window_and_its_saes_directions(planted, mini):
    judge = subject_judge(planted, mini)
    assert judge.context == mini.config.max_position_embeddings
    assert torch.equal(judge.directions, load_sae(planted.manifest.sae).W_dec)
    tokens = torch.tensor([[mini.tokenizer.bos_token_id, 40, 41]])
    with torch.no_grad():
        assert torch.equal(judge.forward(tokens), mini(tokens).logits)


def test_the_subject_of_a_transcoder_is_changed_where_its_latents_write(planted, mini, monkeypatch):
    sae, tokens = load_sae(planted.manifest.sae), torch.tensor([[mini.tokenizer.bos_token_id, 40, 41]])
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    monkeypatch.setattr(type(planted), "load_sae", lambda _: sae)
    add = adding(torch.ones(128), 8.0)
    found = subject_judge(planted, mini).forward(tokens, add)
    assert torch.equal(found, logits_with_replacement(mini, tokens, "blocks.1.hook_mlp_out", add))


def test_scores_of_a_cache_rebuilt_since_or_of_nobody_are_refused(planted, mini, store, tmp_path):
    from tests.planted import planted_cache

    again = planted_cache(planted, tmp_path / "again", [planted.latent(0).position[::2]], mini)
    path = shutil.copy(store, tmp_path / "store")
    with pytest.raises(UsageError, match="another cache"):
        score_with_models(again, mini.tokenizer, path, [EncoderJudge(bag_of_letters)], latents=2)
    with pytest.raises(UsageError, match="no explanations by 'llm:x'; there are those of: rules, token-lookup"):
        score_with_models(planted, mini.tokenizer, path, [EncoderJudge(bag_of_letters)], latents=2, explainer="llm:x")
    with pytest.raises(UsageError, match="latents is -1; it must be 1 or more"):  # all but one were scored
        score_with_models(planted, mini.tokenizer, path, [EncoderJudge(bag_of_letters)], latents=-1)


def test_the_command_scores_with_the_subject_model(capsys, planted, store, tmp_path):
    """On a cache whose store and SAE are at hand: the table has the controls, a rerun computes nothing."""
    assert store.parent == planted.folder
    cache = shutil.copytree(planted.folder, tmp_path / "cache")
    code, out, _ = run(capsys, "autointerp", cache, "n_scored=1", "--subject")
    assert code == 0 and "over another's" in out and "\nsubject  Intervention, log-probability gain (nats)  " in out


def test_the_command_scores_without_explanations_beside_the_random_twin(capsys, planted, store, tmp_path):
    """Planted latents fire on one token each: the segments that hold it belong together, unless both sides hold it."""
    cache = shutil.copytree(planted.folder, tmp_path / "cache")
    shutil.copytree(cache, cache / "random-twin")  # a twin that is the SAE itself
    code, out, _ = run(capsys, "autointerp", cache, "n_scored=8", "--encoder", "n-grams", "--json")
    rows = {(row["scorer"], row["negatives"]): row for row in json.loads(out)}
    assert code == 0 and {row["judge"] for row in rows.values()} == {"n-grams"}
    for scorer, chance in (("intruder", 0.2), ("example_embedding", 0.5)):
        row = rows[scorer, "random"]
        assert row["value"] > chance + 0.1 and row["n"] == 8 and row["empty"]["value"] is None
        assert abs(row["shuffled"]["value"] - chance) < 0.1
        assert row["value"] - rows[scorer, "same-token"]["value"] > 0.05
        assert row["random_twin"]["value"] == pytest.approx(row["value"])
        assert -1 <= row["rank_with_detection"]["value"] <= 1 or row["rank_with_detection"]["value"] is None
    for file in (cache / "random-twin").glob(f"{store.name}*"):
        file.unlink()
    with Store(cache / "random-twin" / store.name, cache_identity(FeatureCache.open(cache))):
        pass  # of a twin that was never explained
    code, out, _ = run(capsys, "autointerp", cache, "n_scored=8", "--encoder", "n-grams", "--json")
    assert code == 0 and {row["random_twin"]["value"] for row in json.loads(out)} == {None}


def test_an_encoder_is_not_told_the_scores_of_another_nor_of_another_language(
    capsys, planted, store, tmp_path, monkeypatch
):
    """Both were kept under one name: the second encoder computed nothing and was shown the first one's figures."""
    monkeypatch.setattr("sae_italian.cli.cache.Encoder", lambda folder: lambda texts: bag_of_letters(texts)[:, [0, 0]])
    cache, found = shutil.copytree(planted.folder, tmp_path / "cache"), {}
    for more in (["a"], ["b"], ["a", "--language", "en"]):
        code, out, _ = run(capsys, "autointerp", cache, "n_scored=2", "--json", "--encoder", *more)
        assert code == 0
        found |= {row["judge"]: row for row in json.loads(out) if row["scorer"] == "embedding"}
    assert list(found) == ["n-grams", "encoder a", "encoder b", "n-grams:en", "encoder a:en"]
