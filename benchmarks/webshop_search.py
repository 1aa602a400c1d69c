"""Ranks of WebShop's search beside those of Lucene, which the official server uses.

    python -m benchmarks.webshop_search DATA_DIR ANSERINI.jar [--output FILE]

ANSERINI.jar is the fat jar in pyserini's wheel (0.24.0: pyserini/resources/jars); it needs a JDK 11
or newer. Queries are the first 1,500 instructions and the oracle's queries of 300 test goals.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, write_json
from hero.envs.shop.guide import guide_to
from hero.envs.webshop import WebShopEnv
from hero.envs.webshop.words import stemmed_words

INSTRUCTIONS, ORACLE_QUERIES = 1500, 300
RESULTS = Path(__file__).parent / "results" / "webshop-search.json"
JAVA = """
import java.io.*; import java.nio.file.*; import java.util.*;
import com.fasterxml.jackson.databind.*;
import org.apache.lucene.document.*; import org.apache.lucene.index.*;
import org.apache.lucene.search.*; import org.apache.lucene.search.similarities.*;
import org.apache.lucene.store.*; import io.anserini.analysis.*;

public class Ranks {
  public static void main(String[] files) throws Exception {
    var analyzer = DefaultEnglishAnalyzer.newDefaultInstance();
    var bm25 = new BM25Similarity(0.9f, 0.4f);
    var store = new ByteBuffersDirectory();
    var config = new IndexWriterConfig(analyzer);
    config.setSimilarity(bm25);
    try (var writer = new IndexWriter(store, config)) {
      for (String line : Files.readAllLines(Path.of(files[0]))) {
        var node = new ObjectMapper().readTree(line);
        var document = new Document();
        document.add(new StringField("id", node.get("id").asText(), Field.Store.YES));
        document.add(new TextField("text", node.get("contents").asText(), Field.Store.NO));
        writer.addDocument(document);
      }
      writer.forceMerge(1);
    }
    var searcher = new IndexSearcher(DirectoryReader.open(store));
    searcher.setSimilarity(bm25);
    try (var out = new PrintWriter(files[2], "UTF-8")) {
      for (String query : Files.readAllLines(Path.of(files[1]))) {
        var words = AnalyzerUtils.analyze(analyzer, query);
        var counts = new LinkedHashMap<String, Integer>();
        for (String word : words) counts.merge(word, 1, Integer::sum);
        var builder = new BooleanQuery.Builder();
        counts.forEach((word, count) -> builder.add(
            new BoostQuery(new TermQuery(new Term("text", word)), count),
            BooleanClause.Occur.SHOULD));
        var ids = new ArrayList<String>();
        for (ScoreDoc hit : searcher.search(builder.build(), 50).scoreDocs)
          ids.add(searcher.doc(hit.doc).get("id"));
        out.println(String.join(" ", words) + "\\t" + String.join(" ", ids));
      }
    }
  }
}
"""


def lucene(queries: Sequence[str], documents: Path, jar: Path) -> list[tuple[list[str], list[str]]]:
    """(words, ids of the best 50) of each query."""
    with tempfile.TemporaryDirectory() as folder:
        source, asked, found = (Path(folder) / name for name in ("Ranks.java", "asked", "found"))
        source.write_text(JAVA, encoding="utf-8")
        asked.write_text("".join(f"{query}\n" for query in queries), encoding="utf-8")
        words = ["java", "-cp", str(jar), str(source), str(documents), str(asked), str(found)]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        lines = found.read_text(encoding="utf-8").split("\n")[:-1]
    pairs = (line.split("\t") for line in lines)
    return [(words.split(), ids.split()) for words, ids in pairs]


def agreement(ours: Sequence[list[str]], theirs: Sequence[list[str]]) -> dict[str, Any]:
    """Shares of equal first hits, of the first ten and fifty, and of lists that are equal."""
    pairs = list(zip(ours, theirs, strict=True))

    def overlap(size: int) -> float:
        shares = [len({*a[:size]} & {*b[:size]}) / max(1, len(b[:size])) for a, b in pairs]
        return sum(shares) / len(shares)

    return {
        "queries": len(pairs),
        "first": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs),
        "top_10": overlap(10), "top_50": overlap(50),
        "same_order": sum(a == b for a, b in pairs) / len(pairs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("jar", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    env = WebShopEnv(str(given.data_dir))
    shop = env._shop
    instructions = [goal.instruction for goal in shop.goals[:INSTRUCTIONS]]
    queries = [guide_to(shop, task).query for task in env.tasks("test")[:ORACLE_QUERIES]]
    asked = [" ".join(query.split()) for query in [*instructions, *queries]]
    theirs = lucene(asked, given.data_dir / "documents_1k.jsonl", given.jar)
    ours = [list(shop.search(query)) for query in asked]
    lists = "".join(f"{ids[:1]} {sorted(ids)}\n" for _, ids in theirs[:INSTRUCTIONS])
    results = {
        "instructions": INSTRUCTIONS,
        "same_words": sum(stemmed_words(q) == w for q, (w, _) in zip(asked, theirs, strict=True)),
        "of_instructions": agreement(ours[:INSTRUCTIONS], [i for _, i in theirs[:INSTRUCTIONS]]),
        "of_oracle_queries": agreement(ours[INSTRUCTIONS:], [i for _, i in theirs[INSTRUCTIONS:]]),
        "lucene_sha256": hashlib.sha256(lists.encode()).hexdigest(),
        "lucene": given.jar.name, "machine": describe("cpu"),
    }  # fmt: skip
    write_json(given.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
