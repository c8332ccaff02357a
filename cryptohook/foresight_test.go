package cryptohook

import (
	"context"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"
)

// foreseen are sessions that a transaction is about to store; the first one is stored, claimed and awaited already.
var foreseen = []id.SessionID{"known", "new", "other"}

// withForesight runs fn in a transaction that has looked ahead.
func withForesight(t *testing.T, fn func(ctx context.Context, s *store) error) *store {
	t.Helper()
	s, ctx := newTestStore(t), t.Context()
	err := s.putClaim(ctx, someClaim(foreseen[0], StateSenderVerified))
	for i, sessionID := range foreseen {
		if err == nil {
			err = s.putInboxEvent(ctx, &inboxEvent{eventID: id.EventID("$" + sessionID), seq: int64(i + 1), roomID: "!r", event: "{}"})
		}
	}
	if err == nil {
		err = s.markLate(ctx, "$known", "known")
	}
	if err != nil {
		t.Fatal(err)
	}
	err = s.write(ctx, func(ctx context.Context) error {
		ctx, err := s.foresee(ctx, foreseen)
		if err != nil {
			return err
		}
		return fn(ctx, s)
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func someClaim(sessionID id.SessionID, state State) *SenderData {
	return &SenderData{
		SessionID: sessionID, RoomID: "!r", Sender: "@alice:test", SenderKey: "curve", SigningKey: "ed", Source: SourceDirect, State: state,
		ReceivedAt: time.UnixMilli(1), UpdatedAt: time.UnixMilli(1),
	}
}

func TestForesightKnowsWhatIsNotThere(t *testing.T) {
	withForesight(t, func(ctx context.Context, _ *store) error {
		f := foresightOf(ctx)
		for i, sessionID := range foreseen {
			if f.unclaimed.has(sessionID) != (i > 0) || f.unawaited.has(sessionID) != (i > 0) {
				t.Errorf("%s: unclaimed %t, unawaited %t", sessionID, f.unclaimed.has(sessionID), f.unawaited.has(sessionID))
			}
		}
		if f.unclaimed.has("never heard of") || f.unawaited.has("never heard of") {
			t.Error("it knows of a session that was not asked for")
		}
		return nil
	})
}

// What the same transaction has stored counts as what was there before it does.
func TestClaimThatTheTransactionStoresIsMergedWith(t *testing.T) {
	for _, sessionID := range foreseen {
		s := withForesight(t, func(ctx context.Context, s *store) error {
			if err := s.noteAndMerge(ctx, someClaim(sessionID, StateSenderVerified)); err != nil {
				return err
			}
			return s.noteAndMerge(ctx, someClaim(sessionID, StateUnknownDevice))
		})
		if claims := must(s.claims(t.Context(), sessionID)); len(claims) != 1 || claims[0].State != StateSenderVerified {
			t.Errorf("%s: a worse key has taken the place of a better one: %+v", sessionID, claims)
		}
	}
}

func (s *store) noteAndMerge(ctx context.Context, claim *SenderData) error {
	if _, err := s.noteSigners(ctx, claim); err != nil {
		return err
	}
	_, err := s.mergeClaim(ctx, claim)
	return err
}

func TestHoldersClaimIsSeenByTheTransactionThatMakesIt(t *testing.T) {
	s := withForesight(t, func(ctx context.Context, s *store) error {
		if err := s.claimForHolder(ctx, "new", &holder{roomID: "!r", senderKey: "curve", signingKey: "ed"}); err != nil {
			return err
		}
		return s.noteAndMerge(ctx, someClaim("new", StateUnknownDevice))
	})
	claims := must(s.claims(t.Context(), "new"))
	if len(claims) != 1 || claims[0].Sender != "@alice:test" || !claims[0].ReceivedAt.Equal(time.UnixMilli(0)) {
		t.Errorf("the holder of the session has %d claims: %+v", len(claims), claims)
	}
}

func TestEventThatBeginsToWaitInTheTransactionIsWoken(t *testing.T) {
	w := newTrustWorld(t)
	err := w.hook.store.putInboxEvent(w.ctx, &inboxEvent{eventID: "$late", seq: 1, roomID: "!r", event: "{}"})
	if err == nil {
		err = w.hook.store.write(w.ctx, func(ctx context.Context) error {
			ctx, err := w.hook.store.foresee(ctx, foreseen)
			if err != nil {
				return err
			}
			if err = w.hook.store.markLate(ctx, "$late", "new"); err != nil {
				return err
			}
			return w.hook.wakeLate(ctx, "new")
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	if pending := must(w.hook.store.pendingInbox(w.ctx, 0, 10)); len(pending) != 1 || pending[0].eventID != "$late" {
		t.Errorf("the event still waits for a key that is there; pending: %v", pending)
	}
}
