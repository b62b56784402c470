"""Names in a record are text of others, too."""

import json
from pathlib import Path

from advcl_hub.hub.cards import card
from advcl_hub.hub.export import CONFIG, RESULTS
from advcl_hub.hub.released import BUNDLED

CLASSIFIER = BUNDLED / "resnet10_cifar.pseudo_label_at_c10_aff"


def test_names_of_versions_bring_no_html_and_no_lines(tmp_path: Path) -> None:
    results, config = (json.loads((CLASSIFIER / name).read_text(encoding="utf-8")) for name in (RESULTS, CONFIG))
    results["places"][-1]["versions"] = {"<script>x</script>\n# big": "1"}
    for name, record in ((RESULTS, results), (CONFIG, config)):
        (tmp_path / name).write_text(json.dumps(record), encoding="utf-8")
    text = card(tmp_path, "a/b", "hf-hub:a/b")
    assert "&lt;script>x&lt;/script> # big 1" in text and "<script>" not in text and "\n# big" not in text
