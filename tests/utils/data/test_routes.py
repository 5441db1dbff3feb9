import json
from pathlib import Path

import datasets
import pytest

from utils.config.settings import DataConfig
from utils.data.documents import document_name, load_documents
from utils.data.routes import NO_ROUTE, Routes
from utils.data.windows import make_windows_by_route
from utils.errors import UserError


def table(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(domain: str, texts: int = 6) -> list[dict]:
    return [{"text": f"{domain} number {number}", "domain": domain} for number in range(texts)]


def load(*paths: Path, routes: Routes, **settings):
    return load_documents(DataConfig(train=[str(path) for path in paths], **settings), routes)


def routes_of(corpus, routes: Routes) -> dict[str, str]:
    return {text: routes.route_of(document_name(text)) for text in [*corpus.train, *corpus.eval]}


def test_a_column_routes_the_documents_of_both_sides(tmp_path):
    routes = Routes({"code", "law"}, "domain")
    rows = [*rows_of("code"), *rows_of("law"), *rows_of("poems"), {"text": "of no domain"}]
    train = table(tmp_path / "a.jsonl", rows)
    held_out = table(tmp_path / "b.jsonl", [{"text": "held out", "domain": "law"}])
    of_texts = routes_of(load(train, routes=routes, eval=str(held_out)), routes)

    assert len(of_texts) == 20
    assert of_texts["code number 3"] == "code"
    assert of_texts["held out"] == "law"
    # a value that is for nobody in particular is as none
    assert of_texts["poems number 1"] == of_texts["of no domain"] == NO_ROUTE


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_every_kind_of_table_has_routes(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    rows = datasets.Dataset.from_list(rows_of("code") + rows_of("law"))
    getattr(rows, f"to_{suffix}")(str(path))
    routes = Routes({"code"}, "domain")
    of_texts = routes_of(load(path, routes=routes), routes)
    assert of_texts == {row["text"]: "code" if row["domain"] == "code" else NO_ROUTE for row in rows}


def test_a_column_routes_plain_text_files_to_nobody_in_particular(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\ntwo\n")
    routes = Routes({"code"}, "domain")
    of_texts = routes_of(load(plain, table(tmp_path / "b.jsonl", rows_of("code")), routes=routes), routes)
    assert of_texts["one"] == of_texts["two"] == NO_ROUTE
    assert list(of_texts.values()).count("code") == 6


def test_numbers_are_routes_as_they_are_written(tmp_path):
    rows = [{"text": f"text {number}", "grade": number % 2} for number in range(6)]
    routes = Routes({"1"}, "grade")
    of_texts = routes_of(load(table(tmp_path / "a.jsonl", rows), routes=routes), routes)
    assert of_texts["text 3"] == "1" and of_texts["text 2"] == NO_ROUTE


def test_a_text_of_several_rows_has_the_route_of_the_first(tmp_path):
    rows = [{"text": "same", "domain": "law"}, {"text": "same", "domain": "code"}, *rows_of("code")]
    routes = Routes({"code", "law"}, "domain")
    assert routes_of(load(table(tmp_path / "a.jsonl", rows), routes=routes), routes)["same"] == "law"


def test_an_unknown_column_is_refused_with_those_of_the_data(tmp_path):
    path = table(tmp_path / "a.jsonl", rows_of("code"))
    with pytest.raises(UserError, match=r"got the column 'domian', which no row has a value in.* domain. Correct"):
        load(path, routes=Routes({"code"}, "domian"))


def test_an_unknown_value_is_refused_with_those_of_the_data(tmp_path):
    path = table(tmp_path / "a.jsonl", rows_of("code") + rows_of("law"))
    with pytest.raises(UserError, match=r"got 'cod' for the column 'domain'.* Expected values of the data: code, law"):
        load(path, routes=Routes({"cod", "law"}, "domain"))


def test_a_value_of_documents_that_are_not_used_is_of_none(tmp_path):
    path = table(tmp_path / "a.jsonl", rows_of("code") + rows_of("law"))
    with pytest.raises(UserError, match="got 'law'"):
        load(path, routes=Routes({"code", "law"}, "domain"), max_documents=6)


def test_sources_are_routes_where_no_column_is_named(tmp_path):
    paths = [table(tmp_path / f"{name}.jsonl", rows_of(name)) for name in ("code", "law")]
    routes = Routes({str(paths[0])})
    of_texts = routes_of(load(*paths, routes=routes), routes)
    assert of_texts["code number 0"] == str(paths[0]) and of_texts["law number 0"] == str(paths[1])


def test_other_values_of_the_same_texts_have_another_fingerprint(tmp_path):
    fingerprints = []
    for domain in ("law", "poems", "code"):
        rows = [*rows_of("code"), {"text": "of several", "domain": domain}]
        corpus = load(table(tmp_path / "a.jsonl", rows), routes=Routes({"code"}, "domain"), eval_fraction=0.1)
        names = [document_name(text) for text in [*corpus.train, *corpus.eval]]
        fingerprints.append(corpus.routes.fingerprint(names))
    # both law and poems are for nobody in particular
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_window_has_documents_of_one_route(tmp_path):
    def encode(texts, names):
        return [{"texts": "|".join(texts)}]

    routes = Routes({"code"}, "domain")
    corpus = load(table(tmp_path / "a.jsonl", rows_of("code") + rows_of("law") + rows_of("poems")), routes=routes)
    windows = make_windows_by_route(corpus.train, routes, encode=encode, fingerprint="test")
    assert set(windows["route"]) == {"code", NO_ROUTE} and len(windows) == 2
    for window in windows:
        is_code = ["code" in text for text in str(window["texts"]).split("|")]
        assert set(is_code) == {window["route"] == "code"}
