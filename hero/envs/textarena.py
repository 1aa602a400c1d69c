"""TextArena's games for one player."""

from __future__ import annotations

from typing import Any

from hero.envs.base import StepResult
from hero.envs.seeded import Info, Seeded
from hero.types import FeedbackKind

INVALID = "You attempted an invalid move."
"""How TextArena's answer to a move begins that the rules do not allow."""


class TextArenaEnv(Seeded):
    """One game; picklable, by its moves. The reward is the game's, paid at its end.

    Args:
        id: as textarena.make takes it; see textarena's list of games for one player.
        success: reward from which a game is won.
        max_steps, num_train, num_dev, num_test: as for every seeded world.
    """

    system_prompt = "You play a game. Answer with one move in the form that the rules ask for."

    def __init__(
        self, id: str = "TowerOfHanoi-v0", *, success: float = 1.0, max_steps: int = 50,
        num_train: int = 1000, num_dev: int = 100, num_test: int = 100,
    ) -> None:  # fmt: skip
        super().__init__(
            max_steps=max_steps, num_train=num_train, num_dev=num_dev, num_test=num_test
        )
        self.id, self.success = id, success
        self._task_id, self._moves = "", list[str]()
        self._make()

    def _make(self) -> None:
        """A new game: an old one goes on showing what was said in it."""
        import textarena

        try:
            self._game = textarena.make(self.id)
        except Exception as error:  # textarena has no class for it; some games fetch word lists
            raise ValueError(f"textarena cannot make {self.id!r}: {error}") from error

    def reset(self, task_id: str) -> tuple[str, Info]:
        seed = self.seed_of(task_id)
        self._make()
        self._game.reset(num_players=1, seed=seed)
        self._task_id, self._moves, self._steps, self._seen = task_id, [], 0, ""
        return self._new(), {"task_id": task_id}

    def step(self, text: str) -> StepResult:
        self._moves.append(text)
        done, _ = self._game.step(text)
        seen, reward, info = self._new(text), 0.0, dict[str, Any]()
        cut = self.cut(bool(done))
        if done:
            rewards, about = self._game.close()
            reward, end = float((rewards or {}).get(0, 0.0)), (about or {}).get(0, {})
            seen = f"{seen}\n{end.get('reason', '')}".strip()
            info = {"invalid_move": bool(end.get("invalid_move"))}
        bad = INVALID in seen or info.pop("invalid_move", False)
        info |= {
            "valid": not bad, "success": bool(done) and not bad and reward >= self.success,
            "feedback_kind": FeedbackKind.INVALID_ACTION if bad else FeedbackKind.OK,
        }  # fmt: skip
        return seen or "The game is over.", reward, bool(done), cut, info

    def _new(self, move: str = "") -> str:
        """What was not said before: TextArena repeats the whole game, the player's moves too."""
        text = str(self._game.get_observation()[1])
        new = text[len(self._seen) :] if text.startswith(self._seen) else text
        self._seen = text
        return new.replace(f"[Player] {move}", "", 1).strip() if move else new.strip()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_game"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        moves = self._moves
        if self._task_id:
            self.reset(self._task_id)
            for move in moves:
                self.step(move)
        else:
            self._make()

    def close(self) -> None:
        """Nothing to release."""
