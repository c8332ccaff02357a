package cryptohook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/util/ptr"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// What is stored of the keys of one /sync takes a few statements, not some for each.
func TestSimpleKeysAreWrittenTogether(t *testing.T) {
	w := newTrustWorld(t)
	people := w.crowdOf(30)
	sessions := make([]*megolm, len(people))
	share := func() (keys []object) {
		for i, device := range people {
			sessions[i] = newMegolm(trustRoom)
			keys = append(keys, w.share(device, sessions[i]))
		}
		return keys
	}
	w.sync(syncPart{toDevice: share()}) // the devices are noted
	for _, table := range []string{"INTO crypto_megolm_inbound_session", "INTO sendertrust_claim"} {
		keys := share()
		count := w.statements(table)
		w.sync(syncPart{toDevice: keys})
		if got := count.count.Load(); got > 6 {
			t.Errorf("%d statements with %q for %d keys", got, table, len(people))
		}
		for i, device := range people {
			w.wantState(sessions[i], device, StateSenderUnverified)
		}
	}
}

// groupsHeld are all columns of all Megolm sessions.
func groupsHeld(t *testing.T, db *dbutil.Database) (held []string) {
	t.Helper()
	rows := must(db.Query(t.Context(), "SELECT * FROM crypto_megolm_inbound_session ORDER BY session_id"))
	names := must(rows.Columns())
	for rows.Next() {
		values, into := make([]any, len(names)), make([]any, len(names))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatal(err)
		}
		held = append(held, fmt.Sprintf("%q", values))
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		t.Fatal(err)
	}
	return held
}

// A row is as mautrix writes it, in whatever state the one before it was.
func TestGroupsAreWrittenAsMautrixDoes(t *testing.T) {
	_, r, _ := unitWorld(t)
	ctx := t.Context()
	plain := must(crypto.NewInboundGroupSession("sender", "signing", "!r:test", newMegolm("!r:test").key, 0, 0, nil, false))
	full := must(crypto.NewInboundGroupSession("sender2", "signing2", "!s:test", newMegolm("!s:test").key, 7*24*time.Hour, 100, ptr.Ptr(true), true))
	full.ForwardingChains, full.KeyBackupVersion, full.KeySource, full.SourceUser = []string{"a", "b"}, "3", id.KeySourceForward, "@a:test"
	full.RatchetSafety.NextIndex, full.RatchetSafety.MissedIndices = 5, []uint{2, 3}
	undated := must(crypto.NewInboundGroupSession("sender3", "signing3", "!r:test", newMegolm("!r:test").key, 0, 0, nil, false))
	undated.ReceivedAt = time.Time{}
	sessions := []*crypto.InboundGroupSession{plain, full, undated}
	befores := map[string]func(session *crypto.InboundGroupSession) error{
		"nothing there": func(*crypto.InboundGroupSession) error { return nil },
		"withheld before": func(session *crypto.InboundGroupSession) error {
			return r.uow.SQLCryptoStore.PutWithheldGroupSession(ctx, event.RoomKeyWithheldEventContent{
				RoomID: session.RoomID, SessionID: session.ID(), SenderKey: session.SenderKey, Code: event.RoomKeyWithheldUnverified, Reason: "so",
			})
		},
		"another there": func(session *crypto.InboundGroupSession) error {
			return r.uow.SQLCryptoStore.PutGroupSession(ctx, &crypto.InboundGroupSession{
				Internal: session.Internal, SigningKey: "x", SenderKey: "y", RoomID: "!z:test", ForwardingChains: []string{"c"}, ReceivedAt: time.Now(),
				MaxAge: 9, MaxMessages: 9, SharedHistory: ptr.Ptr(false), KeyBackupVersion: "9", KeySource: id.KeySourceBackup, SourceUser: "@z:test",
			})
		},
	}
	for name, before := range befores {
		written := func(write func() error) []string {
			t.Helper()
			_, err := r.db.Exec(ctx, "DELETE FROM crypto_megolm_inbound_session")
			for _, session := range sessions {
				err = errors.Join(err, before(session))
			}
			if err = errors.Join(err, write()); err != nil {
				t.Fatal(err)
			}
			return groupsHeld(t, r.db)
		}
		want := written(func() (err error) {
			for _, session := range sessions {
				err = errors.Join(err, r.uow.SQLCryptoStore.PutGroupSession(ctx, session))
			}
			return err
		})
		if got := written(func() error { return r.uow.insertGroups(ctx, sessions) }); len(got) != 3 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: written together\n%s\nas mautrix does\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// Whoever writes between two keys in a transaction sees the first one, whole, and not the second.
func TestPileIsWrittenBeforeAnythingElseIs(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}}) // the device is noted
	r := newReceiving(w.hook)
	first, second := newMegolm(trustRoom), newMegolm(trustRoom)
	var groups, claims int
	for _, s := range []*megolm{first, second} {
		if err := w.hook.receiveRoomKey(r.context(w.ctx), arriving(t, alice, s)); err != nil {
			t.Fatal(err)
		}
		if s == first {
			w.hook.uow.stage(func(ctx context.Context) error {
				return errors.Join(
					w.db.QueryRow(ctx, "SELECT COUNT(*) FROM crypto_megolm_inbound_session WHERE session_id IN ($1, $2)", first.id(), second.id()).Scan(&groups),
					w.db.QueryRow(ctx, "SELECT COUNT(*) FROM sendertrust_claim WHERE session_id IN ($1, $2)", first.id(), second.id()).Scan(&claims),
				)
			})
		}
	}
	count := w.statements("INTO sendertrust_claim")
	if err := w.hook.commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	if groups != 1 || claims != 1 {
		t.Errorf("between the two keys there are %d sessions and %d claims", groups, claims)
	}
	if got := count.count.Load(); got != 2 {
		t.Errorf("%d statements with claims", got)
	}
	w.wantState(second, alice, StateSenderUnverified)
}

// What is learnt of a sender between a key's coming and its being stored counts for the key.
func TestKeysThatArriveTogetherAreJudgedByWhatIsKnownWhenTheyAreStored(t *testing.T) {
	for name, learn := range map[string]func(w *trustWorld, alice *actorDevice){
		"by a key query": func(w *trustWorld, alice *actorDevice) { alice.owner.reset(); w.mustFetch("@alice:test") },
		"by a verification": func(w *trustWorld, alice *actorDevice) {
			must(0, w.hook.Verify(w.ctx, "@alice:test", alice.owner.masterKey()))
		},
	} {
		w, alice, _ := twoPeople(t)
		w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
		r := newReceiving(w.hook)
		sessions := []*megolm{newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)}
		for _, s := range sessions {
			if err := w.hook.receiveRoomKey(r.context(w.ctx), arriving(t, alice, s)); err != nil {
				t.Fatal(err)
			}
		}
		learn(w, alice)
		if err := w.hook.commit(w.ctx); err != nil {
			t.Fatal(err)
		}
		later := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(alice, later)}})
		for _, s := range sessions {
			got, want := w.row(s, alice), w.row(later, alice)
			if got.State != want.State || got.MasterKey != want.MasterKey {
				t.Errorf("%s: stored as %s of %s, a later key as %s of %s", name, got.State, got.MasterKey, want.State, want.MasterKey)
			}
		}
	}
}

// One key that PostgreSQL refuses does not keep the others from being stored.
func TestKeyThatPostgreSQLRefusesIsLeftOutOfThePile(t *testing.T) {
	s, ctx := newStory(t, newPostgres(t), 2), t.Context()
	r := s.open(t, s.seed)
	defer r.close()
	r.uow.foresee = r.store.foresee
	receiving := newReceiving(r.Hook).context(ctx)
	before := r.count("SELECT COUNT(*) FROM crypto_megolm_inbound_session")
	for _, senderKey := range []id.SenderKey{"fits", id.SenderKey(strings.Repeat("l", 44)), "fits too"} {
		session := must(crypto.NewInboundGroupSession(senderKey, "signing", "!r:test", newMegolm("!r:test").key, 0, 0, nil, false))
		if err := r.uow.putGroupSession(receiving, session, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	if stored := r.count("SELECT COUNT(*) FROM crypto_megolm_inbound_session") - before; stored != 2 {
		t.Errorf("%d of the two keys in which there is nothing to refuse are stored", stored)
	}
}

// What stores more than its row is not put on the pile.
func TestOnlySimpleClaimsArePiled(t *testing.T) {
	w := newTrustWorld(t)
	h := w.hook
	claim := func(change func(claim *SenderData)) *SenderData {
		c := signedClaim()
		c.SessionID = foreseen[0]
		change(c)
		return c
	}
	h.store.noted.keep(digestOfSigners(signedClaim()), true)
	if err := h.store.noteAndMerge(w.ctx, claim(func(c *SenderData) { c.SessionID = foreseen[2] })); err != nil {
		t.Fatal(err)
	}
	err := h.store.write(w.ctx, func(ctx context.Context) error {
		ctx, err := h.store.foresee(ctx, foreseen)
		for _, tc := range []struct {
			name string
			*SenderData
			want bool
		}{
			{"rejected", claim(func(c *SenderData) { c.State = StateRejected }), false},
			{"of a device that is not noted", claim(func(c *SenderData) { c.SenderKey = "another" }), false},
			{"of a session that is claimed", claim(func(c *SenderData) { c.SessionID = foreseen[2] }), false},
			{"of a session that was not foreseen", claim(func(c *SenderData) { c.SessionID = "unforeseen" }), false},
			{"simple", claim(func(*SenderData) {}), true},
			{"the second to a session", claim(func(*SenderData) {}), false},
		} {
			p := &pile{}
			if piled := h.pileClaim(ctx, p, tc.SenderData); piled != tc.want || len(p.claims) > 0 != tc.want {
				t.Errorf("%s: piled %t, and %d claims are on the pile", tc.name, piled, len(p.claims))
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Who waits for keys hears of those that are written together, and what else is part of storing a session is done.
func TestKeysOnThePileAreTold(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	r := newReceiving(w.hook)
	sessions := []*megolm{newMegolm(trustRoom), newMegolm(trustRoom)}
	for _, s := range sessions {
		if err := w.hook.receiveRoomKey(r.context(w.ctx), arriving(t, alice, s)); err != nil {
			t.Fatal(err)
		}
	}
	stored := make(map[id.SessionID]int)
	tell := w.hook.uow.stored
	w.hook.uow.stored = func(ctx context.Context, sessionID id.SessionID) error {
		stored[sessionID]++
		return tell(ctx, sessionID)
	}
	var with int
	other := must(crypto.NewInboundGroupSession("sender", "signing", trustRoom, newMegolm(trustRoom).key, 0, 0, nil, false))
	err := w.hook.uow.putGroupSession(r.context(w.ctx), other, func(ctx context.Context) error {
		with = 1
		return w.db.QueryRow(ctx, "SELECT COUNT(*) FROM crypto_megolm_inbound_session WHERE session_id IN ($1, $2)", sessions[1].id(), other.ID()).Scan(&with)
	})
	w.changes.take()
	if err = errors.Join(err, w.hook.commit(w.ctx)); err != nil {
		t.Fatal(err)
	}
	w.hook.tellCommitted()
	told, _ := w.changes.take()
	for _, s := range sessions {
		if !told[s.id()] || stored[s.id()] != 1 {
			t.Errorf("told: %t; stored as far as others hear: %d times", told[s.id()], stored[s.id()])
		}
	}
	if stored[other.ID()] != 1 || with != 2 {
		t.Errorf("what is stored with a session was stored with %d of 2 sessions there", with)
	}
}

func TestTriedOlmSessionsAreRestored(t *testing.T) {
	for _, staged := range []bool{false, true} {
		w, alice, _ := twoPeople(t)
		w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
		session := must(w.hook.uow.GetSessions(w.ctx, alice.senderKey()))[0]
		if staged {
			session.LastDecryptedTime = session.LastDecryptedTime.Add(time.Minute)
			if err := w.hook.uow.UpdateSession(w.ctx, alice.senderKey(), session); err != nil {
				t.Fatal(err)
			}
		}
		before, decrypted := must(session.Internal.Pickle([]byte("pickle"))), session.LastDecryptedTime
		message := w.share(alice, newMegolm(trustRoom))["content"].(object)["ciphertext"].(object)[w.hook.mach.GetAccount().IdentityKey().String()].(object)
		must(session.Decrypt(message["body"].(string), id.OlmMsgType(message["type"].(int))))
		if bytes.Equal(must(session.Internal.Pickle([]byte("pickle"))), before) || session.LastDecryptedTime.Equal(decrypted) {
			t.Fatal("decrypting has changed nothing")
		}
		if err := w.hook.uow.restore(w.ctx, triedSessions{session: {}}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(must(session.Internal.Pickle([]byte("pickle"))), before) || !session.LastDecryptedTime.Equal(decrypted) {
			t.Errorf("staged: %t; the session is not what it was", staged)
		}
	}
}
