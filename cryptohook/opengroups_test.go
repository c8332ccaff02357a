package cryptohook

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/goolm/session"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// sealed is a Megolm session of a sender who numbers messages at will.
type sealed struct{ *session.MegolmOutboundSession }

func newSealed() sealed { return sealed{must(session.NewMegolmOutboundSession())} }

// at encrypts the message of an index. Its session need not be able to open it: ratchets go round.
func (s sealed) at(index uint32) []byte {
	moved := *s.MegolmOutboundSession
	moved.Ratchet.AdvanceTo(index)
	return must(moved.Encrypt(fmt.Appendf(nil, "message %d", index)))
}

// unsound is the message of an index, signed, with another MAC than its own.
func (s sealed) unsound(index uint32) []byte {
	const signatureLength, macLength = 64, 8
	message := must(base64.RawStdEncoding.DecodeString(string(s.at(index))))
	signed := message[:len(message)-signatureLength]
	for i := range macLength {
		signed[len(signed)-1-i] ^= 0xff
	}
	return []byte(base64.RawStdEncoding.EncodeToString(append(signed, must(s.SigningKey.Sign(signed))...)))
}

// unsigned is the message of an index with a wrong signature.
func (s sealed) unsigned(index uint32) []byte {
	message := s.at(index)
	in := len(message) - 10
	if message[in] == 'A' {
		message[in] = 'B'
	} else {
		message[in] = 'A'
	}
	return message
}

// from is the session as somebody holds it who got it at an index.
func (s sealed) from(index uint32) *crypto.InboundGroupSession {
	moved := *s.MegolmOutboundSession
	moved.Ratchet.AdvanceTo(index)
	key := must(moved.Ratchet.SessionSharingMessage(moved.SigningKey))
	return &crypto.InboundGroupSession{
		Internal: must(olm.NewInboundGroupSession(key)), SenderKey: id.SenderKey(s.ID()), SigningKey: id.Ed25519(s.ID()), RoomID: storyRoom, ReceivedAt: time.Now().UTC(),
		ForwardingChains: []string{}, KeySource: id.KeySourceDirect,
	}
}

// opened gives a session as a decrypter gets it.
func opened(t *testing.T, u *unitOfWork, roomID id.RoomID, sessionID id.SessionID) *crypto.InboundGroupSession {
	t.Helper()
	return must(u.GetGroupSession(withDecrypting(t.Context()), roomID, sessionID))
}

// put stores a session behind the unit of work's back.
func put(t *testing.T, u *unitOfWork, session *crypto.InboundGroupSession) {
	t.Helper()
	must(0, u.SQLCryptoStore.PutGroupSession(t.Context(), session))
}

func TestPickleIsOpenedOnceForManyMessages(t *testing.T) {
	_, r, other := unitWorld(t)
	ctx, s := t.Context(), newSealed()
	put(t, r.uow, s.from(0))
	first := opened(t, r.uow, storyRoom, s.ID())
	must3(first.Internal.Decrypt(s.at(90)))
	second := opened(t, r.uow, storyRoom, s.ID())
	if first.Internal != second.Internal {
		t.Error("the pickle was opened twice")
	}
	if first == second {
		t.Error("two decrypters have one session, and may write into it")
	}
	if plaintext, _ := must3(second.Internal.Decrypt(s.at(3))); string(plaintext) != "message 3" {
		t.Errorf("an earlier message is read as %q", plaintext)
	}
	// Who passes sessions on gets what is stored.
	exported := must(r.uow.GetGroupSession(ctx, storyRoom, s.ID()))
	stored := must(other().SQLCryptoStore.GetGroupSession(ctx, storyRoom, s.ID()))
	if exported.Internal == first.Internal || string(must(exported.Internal.Pickle([]byte("key")))) != string(must(stored.Internal.Pickle([]byte("key")))) {
		t.Error("who exports a session gets the decrypters'")
	}
	if got := opened(t, other(), storyRoom, s.ID()); got.Internal == first.Internal {
		t.Error("another unit of work has the same session open")
	}
}

func must3(plaintext []byte, index uint, err error) ([]byte, uint) {
	if err != nil {
		panic(err)
	}
	return plaintext, index
}

// TestOpenSessionIsMautrixsOwn: what is read for a decrypter is what mautrix's own method reads.
func TestOpenSessionIsMautrixsOwn(t *testing.T) {
	_, r, _ := unitWorld(t)
	plain, full, bare := newSealed(), newSealed(), newSealed()
	put(t, r.uow, plain.from(0))
	shared := true
	stored := full.from(5)
	stored.ForwardingChains, stored.MaxAge, stored.MaxMessages, stored.SharedHistory, stored.IsScheduled = []string{"a", "b"}, 1000, 10, &shared, true
	stored.KeyBackupVersion, stored.KeySource, stored.SourceUser = "7", id.KeySourceForward, "@alice:test"
	put(t, r.uow, stored)
	put(t, r.uow, bare.from(0))
	must(r.db.Exec(t.Context(), "UPDATE crypto_megolm_inbound_session SET forwarding_chains=NULL, received_at=NULL, signing_key=NULL, shared_history=NULL WHERE session_id=$1", bare.ID()))
	for _, s := range []sealed{plain, full, bare} {
		for _, roomID := range []id.RoomID{storyRoom, "!elsewhere:test"} {
			want, wantErr := r.uow.SQLCryptoStore.GetGroupSession(t.Context(), roomID, s.ID())
			for range 2 {
				got, err := r.uow.GetGroupSession(withDecrypting(t.Context()), roomID, s.ID())
				if got != nil {
					internal := *got.Internal.(*openGroup).InboundGroupSession.(*session.MegolmInboundSession)
					got.Internal = &internal
				}
				if !reflect.DeepEqual(got, want) || !errors.Is(err, wantErr) {
					t.Errorf("read %+v (%v), and mautrix reads %+v (%v)", got, err, want, wantErr)
				}
			}
		}
	}
}

// TestOpenSessionGivesWayToWhatIsStored: a session that is open is not used any longer than it is stored, in whatever way it was changed.
func TestOpenSessionGivesWayToWhatIsStored(t *testing.T) {
	redacted := func(t *testing.T, u *unitOfWork, s sealed) {
		t.Helper()
		if got, err := u.GetGroupSession(withDecrypting(t.Context()), storyRoom, s.ID()); got != nil || !errors.Is(err, crypto.ErrGroupSessionWithheld) {
			t.Errorf("a session whose key was deleted: %v (%v)", got, err)
		}
	}
	opens := func(index uint32) func(*testing.T, *unitOfWork, sealed) {
		return func(t *testing.T, u *unitOfWork, s sealed) {
			t.Helper()
			got := opened(t, u, storyRoom, s.ID())
			if plaintext, _, err := got.Internal.Decrypt(s.at(index)); err != nil || string(plaintext) != fmt.Sprintf("message %d", index) {
				t.Errorf("reads %q (%v)", plaintext, err)
			}
		}
	}
	for name, tc := range map[string]struct {
		change func(ctx context.Context, r *receiver, s sealed) error
		// before is what is so until the unit of work is durable, if that is not the same as after it.
		before, after func(t *testing.T, u *unitOfWork, s sealed)
	}{
		"its key is deleted": {change: func(ctx context.Context, r *receiver, s sealed) error {
			return r.uow.RedactGroupSession(ctx, storyRoom, s.ID(), "test")
		}, after: redacted},
		"its key is deleted in a transaction of ours": {change: func(ctx context.Context, r *receiver, s sealed) error {
			return r.store.write(ctx, func(ctx context.Context) error {
				return r.reject(ctx, &SenderData{SessionID: s.ID(), SenderKey: id.SenderKey(s.ID()), RoomID: storyRoom})
			})
		}, after: redacted},
		"its key is deleted while receiving": {change: func(ctx context.Context, r *receiver, s sealed) error {
			return r.uow.RedactGroupSession(newReceiving(r.Hook).context(ctx), storyRoom, s.ID(), "test")
		}, before: opens(4), after: redacted},
		"all keys of the device are deleted": {change: func(ctx context.Context, r *receiver, s sealed) error {
			_, err := r.uow.RedactGroupSessions(ctx, storyRoom, id.SenderKey(s.ID()), "test")
			return err
		}, after: redacted},
		"it is too old": {change: func(ctx context.Context, r *receiver, s sealed) error {
			must(r.db.Exec(ctx, "UPDATE crypto_megolm_inbound_session SET received_at=NULL"))
			_, err := r.uow.RedactOutdatedGroupSessions(ctx)
			return err
		}, after: redacted},
		"a better one comes": {change: func(ctx context.Context, r *receiver, s sealed) error {
			return r.uow.PutGroupSession(newReceiving(r.Hook).context(ctx), s.from(0))
		}, after: opens(0)},
		"a better one is imported": {change: func(ctx context.Context, r *receiver, s sealed) error {
			better := s.from(0)
			better.KeySource = id.KeySourceImport
			return r.mach.StoreGroupSession(ctx, better)
		}, after: opens(0)},
		"another program writes it": {change: func(ctx context.Context, r *receiver, s sealed) error {
			return r.uow.SQLCryptoStore.PutGroupSession(ctx, s.from(0))
		}, after: opens(0)},
		"another room is its own now": {change: func(ctx context.Context, r *receiver, s sealed) error {
			moved := s.from(0)
			moved.RoomID = "!elsewhere:test"
			return r.uow.SQLCryptoStore.PutGroupSession(ctx, moved)
		}, after: func(t *testing.T, u *unitOfWork, s sealed) {
			if got := opened(t, u, storyRoom, s.ID()); got != nil {
				t.Errorf("it is still in its former room: %+v", got)
			}
			if got := opened(t, u, "!elsewhere:test", s.ID()); got == nil {
				t.Error("it is not in its new room")
			}
		}},
		"it is gone": {change: func(ctx context.Context, r *receiver, s sealed) error {
			_, err := r.db.Exec(ctx, "DELETE FROM crypto_megolm_inbound_session")
			return err
		}, after: func(t *testing.T, u *unitOfWork, s sealed) {
			if got := opened(t, u, storyRoom, s.ID()); got != nil {
				t.Errorf("it is still there: %+v", got)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			_, r, _ := unitWorld(t)
			ctx, s := t.Context(), newSealed()
			put(t, r.uow, s.from(2))
			opens(9)(t, r.uow, s)
			must(0, tc.change(ctx, r, s))
			if tc.before == nil {
				tc.before = tc.after
			}
			tc.before(t, r.uow, s)
			must(0, r.uow.flush(ctx))
			tc.after(t, r.uow, s)
			tc.after(t, r.uow, s)
		})
	}
}

// TestOpenSessionDecryptsAsOneThatWasJustOpened, whatever was decrypted with it before.
func TestOpenSessionDecryptsAsOneThatWasJustOpened(t *testing.T) {
	s, key := newSealed(), []byte("pickle")
	const first = 7
	pickle := must(s.from(first).Internal.Pickle(key))
	near := []uint32{first - 1, first, first + 1, first + 50, first + 300}
	far := []uint32{
		first + farAhead - 1, first + farAhead, first + 1<<31 - 1, first + 1<<31, first + 1<<31 + farAhead - 2, first + 1<<31 + farAhead, math.MaxUint32, 0,
	}
	var messages [][]byte
	for _, index := range append(near, far...) {
		messages = append(messages, s.at(index), s.unsound(index), s.unsigned(index))
	}
	messages = append(messages, s.unsound(first+20), []byte("garbage"), []byte("!"), nil)
	open := newOpenGroups()
	random := rand.New(rand.NewPCG(1, 2))
	for range 30 {
		for _, i := range random.Perm(len(messages)) {
			group := must(open.open(s.ID(), pickle, key))
			plaintext, index, err := group.Decrypt(messages[i])
			wantText, wantIndex, wantErr := must(unpickle(pickle, key)).Decrypt(messages[i])
			if string(plaintext) != string(wantText) || index != wantIndex || fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Fatalf("message %d: %q at %d (%v); a session that was just opened: %q at %d (%v)", i, plaintext, index, err, wantText, wantIndex, wantErr)
			}
		}
	}
	// What does no harm does not close it.
	group := must(open.open(s.ID(), pickle, key))
	for _, message := range [][]byte{s.at(first + 1), s.at(first), s.at(first - 1), s.at(first + 1<<31 + 5)} {
		_, _, _ = group.Decrypt(message)
	}
	if _, _, err := group.Decrypt(s.unsigned(first)); !errors.Is(err, olm.ErrBadSignature) {
		t.Error(err)
	}
	if must(open.open(s.ID(), pickle, key)) != group {
		t.Error("the session was opened anew without need")
	}
	if _, _, err := group.Decrypt(s.unsound(first + 1)); err == nil || must(open.open(s.ID(), pickle, key)) == group {
		t.Errorf("the session is still used after a message with a wrong MAC (%v)", err)
	}
}

func TestOpenSessionsAreBounded(t *testing.T) {
	open := newOpenGroups()
	key := []byte("pickle")
	pickle := must(newSealed().from(0).Internal.Pickle(key))
	name := func(i int) id.SessionID { return id.SessionID(fmt.Sprint(i)) }
	busy := must(open.open("busy", pickle, key))
	for i := range 3 * groupsInGeneration {
		must(open.open(name(i), pickle, key))
		if must(open.open("busy", pickle, key)) != busy {
			t.Fatalf("a session that is used all the time was closed after %d others", i+1)
		}
		if n := len(open.newer) + len(open.older); n > 2*groupsInGeneration {
			t.Fatalf("%d sessions are open", n)
		}
	}
	_, first := open.look(name(0))
	if _, last := open.look(name(3*groupsInGeneration - 1)); first || !last {
		t.Error("the one that was used last is closed, or the first one is not")
	}
}

// TestManyDecryptAtOnce is for the race detector: the lock here does not rest on mautrix's.
func TestManyDecryptAtOnce(t *testing.T) {
	_, r, _ := unitWorld(t)
	s := newSealed()
	put(t, r.uow, s.from(0))
	var workers sync.WaitGroup
	for worker := range uint32(4) {
		workers.Go(func() {
			for i := range uint32(20) {
				index := (i*7 + worker*13) % 50
				got := opened(t, r.uow, storyRoom, s.ID())
				if plaintext, _, err := got.Internal.Decrypt(s.at(index)); err != nil || string(plaintext) != fmt.Sprintf("message %d", index) {
					t.Errorf("read %q (%v)", plaintext, err)
				}
				if i == 10 {
					_, _, _ = got.Internal.Decrypt(s.unsound(index))
				}
			}
		})
	}
	workers.Wait()
}

// A damaged pickle is told of as before.
func TestDamagedPickleOfADecrypterIsAnErrorOfTheStore(t *testing.T) {
	_, r, _ := unitWorld(t)
	s := newSealed()
	put(t, r.uow, s.from(0))
	opened(t, r.uow, storyRoom, s.ID())
	must(r.db.Exec(t.Context(), "UPDATE crypto_megolm_inbound_session SET session=$1", []byte("damaged")))
	_, err := r.uow.GetGroupSession(withDecrypting(t.Context()), storyRoom, s.ID())
	_, plain := r.uow.GetGroupSession(t.Context(), storyRoom, s.ID())
	if !errors.Is(err, errStorage) || fmt.Sprint(err) != fmt.Sprint(plain) {
		t.Errorf("error %v, without an open session %v", err, plain)
	}
}

// TestIndexAboveAllIsNotLookedUp, and all others are: as if there were no open sessions.
func TestIndexAboveAllIsNotLookedUp(t *testing.T) {
	_, r, other := unitWorld(t)
	ctx := t.Context()
	sessions := []sealed{newSealed(), newSealed()}
	before := other() // what a former process has stored
	for _, s := range sessions {
		put(t, r.uow, s.from(0))
		must(before.ValidateMessageIndex(ctx, s.ID(), "$before", 3, 1))
		must(before.ValidateMessageIndex(ctx, s.ID(), "$before", math.MaxInt32+5, 1))
	}
	must(0, before.flush(ctx))
	used := map[messageIndex]id.EventID{}
	for _, s := range sessions {
		used[messageIndex{s.ID(), 3}], used[messageIndex{s.ID(), math.MaxInt32 + 5}] = "$before", "$before"
	}
	indices := []uint{0, 1, 2, 3, 4, 5, 9, 10, math.MaxInt32 - 1, math.MaxInt32, math.MaxInt32 + 1, math.MaxInt32 + 5, math.MaxUint32}
	random := rand.New(rand.NewPCG(3, 4))
	ask := func(session id.SessionID, index uint) {
		t.Helper()
		key, eventID := messageIndex{session, index}, id.EventID(fmt.Sprintf("$event%d", random.IntN(3)))
		known, isUsed := used[key]
		ctx := ctx
		disputed, nobody := random.IntN(4) == 0, random.IntN(8) == 0
		if disputed {
			ctx = withDisputed(ctx)
		}
		timestamp := int64(1)
		if nobody {
			eventID, timestamp = "", 0
		}
		want := !isUsed || known == eventID
		if valid := must(r.uow.ValidateMessageIndex(ctx, session, eventID, index, timestamp)); valid != want {
			t.Fatalf("%s at index %d: valid %t, want %t; it is used by %q", eventID, index, valid, want, known)
		}
		if !isUsed && !disputed && !nobody {
			used[key] = eventID
		}
	}
	for range 400 {
		switch random.IntN(12) {
		case 0:
			must(0, r.uow.flush(ctx))
		case 1:
			r.uow.open = newOpenGroups()
		case 2:
			r.uow.transaction = func(context.Context, func(context.Context) error) error { return errors.New("the disk is full") }
			if len(r.uow.writes) > 0 && r.uow.flush(ctx) == nil {
				t.Fatal("the flush did not fail")
			}
			r.uow.transaction = r.store.write
		default:
			s := sessions[random.IntN(len(sessions))]
			if random.IntN(3) > 0 {
				opened(t, r.uow, storyRoom, s.ID())
			}
			// The lowest ones first, so that many are above all.
			ask(s.ID(), indices[min(random.IntN(len(indices)), random.IntN(len(indices)))])
		}
	}
	if len(used) < 15 {
		t.Fatalf("%d indices were used", len(used))
	}
}

func TestIndexAboveAllIsNotAskedOfTheDatabase(t *testing.T) {
	_, r, _ := unitWorld(t)
	ctx, s := t.Context(), newSealed()
	put(t, r.uow, s.from(0))
	opened(t, r.uow, storyRoom, s.ID())
	must(r.uow.ValidateMessageIndex(ctx, s.ID(), "$one", 1, 1))
	must(r.db.Exec(ctx, "ALTER TABLE crypto_message_index RENAME TO gone"))
	defer func() { must(r.db.Exec(ctx, "ALTER TABLE gone RENAME TO crypto_message_index")) }()
	for index := range uint(5) {
		if valid, err := r.uow.ValidateMessageIndex(ctx, s.ID(), "$one", 2+index, 1); !valid || err != nil {
			t.Errorf("index %d: valid %t (%v)", 2+index, valid, err)
		}
	}
	if _, err := r.uow.ValidateMessageIndex(ctx, s.ID(), "$one", 0, 1); !errors.Is(err, errStorage) {
		t.Errorf("a lower one is not looked up (%v)", err)
	}
}

// TestSessionOfTheEventIsOpenOnce: an event goes the way that leads to the open session, and a message that was sent on does not.
func TestSessionOfTheEventIsOpenOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	for i := range 3 {
		if seen := w.judgeNow(w.say(alice, s, "hello")); seen.body != "hello" {
			t.Errorf("message %d: %+v", i, seen.verdict)
		}
	}
	group, _ := w.hook.uow.open.look(s.id())
	if group == nil || !group.highestKnown || group.highest != 2 {
		t.Fatalf("open: %+v", group)
	}
	said := w.say(alice, s, "once")
	wantCode(t, w.judgeNow(said), CodeUnverifiedIdentity)
	if replayed := w.judgeNow(w.copyOf(said, "@alice:test")); replayed.verdict.Reason != ReasonReplayed {
		t.Errorf("a replay: %+v", replayed.verdict)
	}
	if now, _ := w.hook.uow.open.look(s.id()); now != group {
		t.Error("the session was opened anew without need")
	}
	must(0, w.hook.uow.RedactGroupSession(w.ctx, trustRoom, s.id(), "test"))
	if seen := w.judgeNow(w.say(alice, s, "too late")); seen.verdict.Code != CodeUnableToDecrypt || seen.verdict.Reason != ReasonKeyDeleted {
		t.Errorf("after its key was deleted: %+v", seen.verdict)
	}
	if strings.Contains(w.log.String(), "too late") || !isWithheld(w, s) {
		t.Error("the key is not deleted")
	}
}

func isWithheld(w *trustWorld, s *megolm) bool {
	_, err := w.hook.uow.GetGroupSession(w.ctx, trustRoom, s.id())
	var withheld *event.RoomKeyWithheldEventContent
	return errors.As(err, &withheld)
}
