package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Errors of the store.

func writing(table string) func(int, string) bool {
	return func(op int, name string) bool {
		return name == table && (op == sqlite3.SQLITE_INSERT || op == sqlite3.SQLITE_UPDATE || op == sqlite3.SQLITE_DELETE)
	}
}

func reading(table string) func(int, string) bool {
	return func(op int, name string) bool { return op == sqlite3.SQLITE_READ && name == table }
}

func transaction(statement string) func(int, string) bool {
	return func(op int, name string) bool { return op == sqlite3.SQLITE_TRANSACTION && name == statement }
}

// changed is a /sync answer with something changed.
func changed(sync json.RawMessage, change func(answer object)) json.RawMessage {
	var answer object
	if err := json.Unmarshal(sync, &answer); err != nil {
		panic(err)
	}
	change(answer)
	return rawJSON(answer)
}

// logWatch lets a test wait for a line of the log.
type logWatch struct {
	text string
	seen chan struct{}
}

func (w *logWatch) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte(w.text)) {
		notify(w.seen)
	}
	return len(line), nil
}

func (w *logWatch) wait(t *testing.T) {
	t.Helper()
	select {
	case <-w.seen:
	case <-time.After(10 * time.Second):
		t.Fatalf("the log never said %q", w.text)
	}
}

// faultyStory is a story of two /syncs, of which the second writes to every table that a /sync can write to. The receiver has
// received the first, and was opened again since: nothing is in memory.
func faultyStory(t *testing.T) (*story, *network, *receiver, *logWatch) {
	t.Helper()
	sqliteOnly(t)
	s := newStory(t, newDatabase(t), 5)
	s.tell(s.peers[0], s.peers[3])
	s.tell(s.peers[1], s.peers[0], s.peers[3], s.peers[2])
	s.Syncs[1] = changed(s.Syncs[1], func(answer object) {
		answer["device_lists"] = object{"changed": []any{s.peers[4].owner.userID}}
		toDevice := answer["to_device"].(object)
		toDevice["events"] = append(toDevice["events"].([]any), object{
			"type": "m.room_key.withheld", "sender": s.peers[4].owner.userID, "content": object{
				"algorithm": string(id.AlgorithmMegolmV1), "code": "m.unverified", "room_id": storyRoom, "session_id": withheldSession,
				"sender_key": s.peers[4].senderKey(),
			},
		})
		// It does not fit into what the database file has room for.
		timeline := answer["rooms"].(object)["join"].(object)[storyRoom.String()].(object)["timeline"].(object)["events"].([]any)
		timeline[0].(object)["content"].(object)["padding"] = strings.Repeat("x", 100_000)
	})
	r := s.open(t, s.seed)
	if err := r.process(t.Context(), s.Syncs[0]); err != nil {
		t.Fatal(err)
	}
	r.close()
	net, watch := s.network(), &logWatch{text: "trying again", seen: make(chan struct{}, 1)}
	r, err := openReceiver(t.Context(), faultyDriver, s.seed, 1, net, s.bot, zerolog.New(watch))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	t.Cleanup(func() { refused.set(nil) })
	return s, net, r, watch
}

// dumpFile is the dump of a database file, past the faults of the receiver's own connection.
func dumpFile(t *testing.T, s *story) map[string]string {
	t.Helper()
	other := must(openDatabase(safeDriver, s.seed))
	defer other.Close()
	return dump(other.RawDB)
}

// withheldSession has the looks of a session's ID, and nothing more.
const withheldSession = "d2l0aGhlbGQgZnJvbSB1cywgYW5kIG5ldmVyIGhlYXI"

func TestFailedCommitKeepsEverythingAndSendsNothing(t *testing.T) {
	for name, refuse := range map[string]func(int, string) bool{
		"begin":                         transaction("BEGIN"),
		"commit":                        transaction("COMMIT"),
		"crypto_account":                writing("crypto_account"),
		"crypto_olm_session":            writing("crypto_olm_session"),
		"crypto_olm_message_hash":       writing("crypto_olm_message_hash"),
		"crypto_megolm_inbound_session": writing("crypto_megolm_inbound_session"),
		"crypto_tracked_user":           writing("crypto_tracked_user"),
		"sendertrust_sender":            writing("sendertrust_sender"),
		"sendertrust_claim":             writing("sendertrust_claim"),
		"sendertrust_claim, reading":    reading("sendertrust_claim"),
		"sendertrust_withheld":          writing("sendertrust_withheld"),
		"sendertrust_inbox":             writing("sendertrust_inbox"),
		"disk full":                     nil,
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			s, net, r, watch := faultyStory(t)
			readers := must(s.readers(ctx))
			net.onSent = func(body []byte) {
				if _, err := read(ctx, readers, body); err != nil {
					t.Error(err)
				}
			}
			before := dumpFile(t, s)
			if refuse == nil {
				r.limitPages(t, 1)
			}
			refused.set(refuse)
			received := make(chan error, 1)
			go func() { received <- r.process(ctx, s.Syncs[1]) }()
			watch.wait(t)
			for range 3 {
				if err := r.send(ctx, s.peers[0].device(), "must not leave"); err == nil {
					t.Error("a message was sent that could not be stored")
				}
			}
			if sent := net.count("sendToDevice"); sent != 0 {
				t.Errorf("%d messages have left", sent)
			}
			if !reflect.DeepEqual(dumpFile(t, s), before) {
				t.Error("a part was written")
			}
			refused.set(nil)
			r.limitPages(t, 1<<30)
			if err := <-received; err != nil {
				t.Fatal(err)
			}
			if code := must(r.store.withheld(ctx, withheldSession, s.peers[4].owner.userID)); code != event.RoomKeyWithheldUnverified {
				t.Errorf("the withheld notice says %q", code)
			}
			if outdated := must(r.uow.GetOutdatedTrackedUsers(ctx)); len(outdated) != 1 {
				t.Errorf("%d outdated device lists, want 1", len(outdated))
			}
			if err := errors.Join(s.check(ctx, r), s.goOn(ctx, r, net, readers)); err != nil {
				t.Error(err)
			}
		})
	}
}

// limitPages bounds the size of the database, or makes it full at once. The receiver has one connection.
func (r *receiver) limitPages(t *testing.T, pages int) {
	t.Helper()
	if _, err := r.db.RawDB.Exec(fmt.Sprintf("PRAGMA max_page_count=%d", pages)); err != nil {
		t.Fatal(err)
	}
}

// TestFailedReadBreaksTheUnitOfWork has a read fail from the beginning, or from the second message on, before which something was learnt, so
// that what was looked up at the beginning is void. mautrix would log that and go on without the message, as if it could not be decrypted.
func TestFailedReadBreaksTheUnitOfWork(t *testing.T) {
	for _, read := range []struct {
		table    string
		messages int
	}{
		{"crypto_olm_message_hash", 0}, {"crypto_olm_session", 0}, {"crypto_device", 0}, {"crypto_tracked_user", 0}, {"sendertrust_identity", 0},
		{"crypto_device", 1}, {"crypto_megolm_inbound_session", 1}, {"crypto_tracked_user", 1}, {"sendertrust_identity", 1}, {"sendertrust_device", 1},
		{"mx_room_state", 1},
	} {
		for name, fail := range unreadable(read.table) {
			t.Run(fmt.Sprintf("%s after %d messages, %s", read.table, read.messages, name), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				s, net, r, _ := faultyStory(t)
				before := dumpFile(t, s)
				messages := 0
				count := func() {
					if messages++; messages > read.messages {
						r.learntInPassing()
						fail()
					}
				}
				if read.messages == 0 {
					count()
				}
				r.mach.CryptoStore = &watched{unitOfWork: r.uow, beforeMessage: count}
				if err := r.process(ctx, s.Syncs[1]); !errors.Is(err, ErrUnitOfWorkBroken) {
					t.Fatalf("the error is %v, want ErrUnitOfWorkBroken", err)
				}
				refused.set(nil)
				s.wantBroken(t, net, r, before)
			})
		}
	}
}

// watched is the store of a machine that says when it begins with a message.
type watched struct {
	*unitOfWork
	beforeMessage func()
}

func (w *watched) GetOlmHash(ctx context.Context, hash [32]byte) (time.Time, error) {
	w.beforeMessage()
	return w.unitOfWork.GetOlmHash(ctx, hash)
}

// wantBroken checks that the receiver never writes or sends anything again, and that a new one loses nothing.
func (s *story) wantBroken(t *testing.T, net *network, r *receiver, before map[string]string) {
	t.Helper()
	ctx := t.Context()
	if err := r.uow.flush(ctx); !errors.Is(err, ErrUnitOfWorkBroken) {
		t.Errorf("a later flush ends with %v", err)
	}
	if err := r.process(ctx, s.Syncs[1]); !errors.Is(err, ErrUnitOfWorkBroken) {
		t.Errorf("the next /sync ends with %v", err)
	}
	if err := r.send(ctx, s.peers[0].device(), "must not leave"); err == nil || net.count("sendToDevice") > 0 {
		t.Errorf("a message has left, error %v", err)
	}
	if err := r.uow.PutAccount(ctx, r.mach.GetAccount()); !errors.Is(err, ErrUnitOfWorkBroken) {
		t.Errorf("storing the account ends with %v", err)
	}
	if !reflect.DeepEqual(dumpFile(t, s), before) {
		t.Error("a part was written")
	}
	if err := r.owner.Release(); err != nil {
		t.Error(err)
	}
	again := s.openWith(t, safeDriver, s.seed, 1, net)
	defer again.close()
	if err := s.feed(ctx, again); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.check(ctx, again), s.goOn(ctx, again, net, must(s.readers(ctx)))); err != nil {
		t.Error(err)
	}
}

// TestUnreadableOlmSessionsBreakTheUnitOfWork damages the table, so that SQLite finds out only while it reads the rows.
func TestUnreadableOlmSessionsBreakTheUnitOfWork(t *testing.T) {
	s, net, r, _ := faultyStory(t)
	root, size := r.count(`SELECT rootpage FROM sqlite_schema WHERE name='crypto_olm_session'`), r.count(`PRAGMA page_size`)
	before := dumpFile(t, s)
	r.close()
	// A start would find the damage. What connections remember of the file they would not read again.
	r = s.openWith(t, safeDriver, s.seed, 1, net)
	defer r.close()
	r.uow.DB.RawDB.SetMaxIdleConns(0)
	file := must(os.OpenFile(s.seed, os.O_RDWR, 0))
	defer file.Close()
	place, whole := int64((root-1)*size), make([]byte, size)
	must(file.ReadAt(whole, place))
	must(file.WriteAt(bytes.Repeat([]byte{0xff}, size), place))
	if err := r.process(t.Context(), s.Syncs[1]); !errors.Is(err, ErrUnitOfWorkBroken) {
		t.Fatalf("the error is %v, want ErrUnitOfWorkBroken", err)
	}
	must(file.WriteAt(whole, place))
	s.wantBroken(t, net, r, before)
}

// TestFailedReadOfAnEncryptorHidesNoOlmSessions: what could not be read is not taken for what is not there.
func TestFailedReadOfAnEncryptorHidesNoOlmSessions(t *testing.T) {
	for name, fail := range unreadable("crypto_olm_session") {
		t.Run(name, func(t *testing.T) {
			s, net, r, _ := faultyStory(t)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			fail()
			if err := r.send(ctx, s.peers[0].device(), "must not leave"); err == nil || net.count("sendToDevice") > 0 {
				t.Errorf("a message has left, error %v", err)
			}
			refused.set(nil)
			if sessions := must(r.uow.GetSessions(ctx, s.peers[0].senderKey())); len(sessions) != 1 {
				t.Errorf("%d Olm sessions, want 1", len(sessions))
			}
			if err := s.feed(ctx, r); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.check(ctx, r), s.goOn(ctx, r, net, must(s.readers(ctx)))); err != nil {
				t.Error(err)
			}
		})
	}
}

// unreadable are the ways in which reading a table fails: the statement, or later its rows.
func unreadable(table string) map[string]func() {
	return map[string]func(){
		"statement": func() { refused.set(reading(table)) },
		"rows":      func() { refused.tear(table) },
	}
}

// Everybody at once.

func TestEverybodyAtOnce(t *testing.T) {
	for _, connections := range []int{1, 0} {
		t.Run(fmt.Sprintf("MaxOpenConns %d", connections), func(t *testing.T) { everybodyAtOnce(t, connections) })
	}
}

// everybodyAtOnce receives a story while encryptors, readers, the inbox and a writer of the account are at work. Each works until
// the story has ended, and at least its share.
func everybodyAtOnce(t *testing.T, connections int) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := t.Context()
	s := newStory(t, newDatabase(t), 8)
	s.tellAll(10)
	s.encryptors = 5
	net := s.network()
	net.left = 49
	r := s.openWith(t, safeDriver, s.seed, connections, net)
	defer r.close()
	readers := must(s.readers(ctx))
	sent := 0
	net.onSent = func(body []byte) {
		sent++
		if _, err := read(ctx, readers, body); err != nil {
			t.Error(err)
		}
	}
	var seen []wantedEvent
	var seenLock sync.Mutex
	all := make(chan struct{})
	r.onEvent(func(event wantedEvent) {
		seenLock.Lock()
		defer seenLock.Unlock()
		if seen = append(seen, event); len(seen) == len(s.events) {
			close(all)
		}
	})

	var ended atomic.Bool
	var workers, background sync.WaitGroup
	work := func(share int, do func(n int) error) {
		workers.Go(func() {
			for n := 0; n < share || !ended.Load(); n++ {
				if err := do(n); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	to := func(n int) *id.Device { return s.Devices[n%len(s.Devices)] }
	work(60, func(n int) error { return r.send(ctx, to(n), "first encryptor") })
	work(60, func(n int) error { return r.send(ctx, to(n*7), "second encryptor") })
	for room := range 3 {
		work(20, func(n int) error {
			roomID := id.RoomID(fmt.Sprintf("!out%d-%d:test", room, n))
			if err := r.mach.ShareGroupSession(ctx, roomID, []id.UserID{to(n).UserID, to(n + 1).UserID}); err != nil {
				return err
			}
			for range 3 {
				if _, err := r.mach.EncryptMegolmEvent(ctx, roomID, event.EventMessage, &event.MessageEventContent{MsgType: event.MsgText, Body: "hi"}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	work(100, func(n int) error {
		key := s.keys[n%len(s.keys)]
		session, err := r.uow.GetGroupSession(ctx, key.RoomID, key.SessionID)
		if err != nil || session == nil {
			return err
		}
		if exported, err := session.Internal.Export(0); err != nil || string(exported) != key.Export {
			return fmt.Errorf("a reader got another key (error %v)", err)
		}
		_, err = session.Internal.Export(uint32(n%5) + 1)
		return err
	})
	work(10, func(n int) error {
		list, err := r.uow.GetGroupSessionsForRoom(ctx, storyRoom).AsList()
		if len(list) > len(s.keys) {
			return fmt.Errorf("%d sessions in the room", len(list))
		}
		return err
	})
	inboxCtx, stopInbox := context.WithCancel(ctx)
	background.Go(func() { r.inbox.run(inboxCtx) })
	background.Go(func() { r.resolver.run(inboxCtx) })

	finished := make(chan struct{})
	go func() {
		defer close(finished)
		for i, sync := range s.Syncs {
			// Some of them have the account written from outside of a message, with a new one-time key.
			if i%3 == 2 {
				sync = changed(sync, func(answer object) { answer["device_one_time_keys_count"] = object{"signed_curve25519": 49} })
			}
			if err := r.process(ctx, sync); err != nil {
				t.Error(err)
			}
		}
		ended.Store(true)
		workers.Wait()
		<-all
		stopInbox()
		background.Wait()
	}()
	select {
	case <-finished:
	case <-time.After(2 * time.Minute):
		var stacks bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2)
		t.Fatalf("stalled:\n%s", stacks.Bytes())
	}
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	s.free = append(s.free, net.uploaded...)
	if len(net.uploaded) < 3 {
		t.Errorf("the account was written with %d new one-time keys only", len(net.uploaded))
	}
	if err := errors.Join(s.check(ctx, r), s.checkHandled(seen), s.goOn(ctx, r, net, readers)); err != nil {
		t.Error(err)
	}
	t.Logf("%d messages were sent and read beside %d room keys", sent, len(s.keys))
}

// What the wrapper promises.

// newOlmPair gives an Olm session with a peer, as mautrix would store it.
func newOlmPair(t *testing.T, s *story, r *receiver, p *peer) *crypto.OlmSession {
	t.Helper()
	now := time.Now()
	peerAccount := crypto.NewOlmAccount()
	if err := peerAccount.Internal.GenOneTimeKeys(1); err != nil {
		t.Fatal(err)
	}
	for _, key := range must(peerAccount.Internal.OneTimeKeys()) {
		session := &crypto.OlmSession{Internal: must(r.mach.GetAccount().Internal.NewOutboundSession(p.senderKey(), key))}
		session.CreationTime, session.LastEncryptedTime, session.LastDecryptedTime = now, now, now.Add(time.Second)
		return session
	}
	panic("no one-time key")
}

// unitWorld is a receiver without a story, and the store alone as another process would see it.
func unitWorld(t *testing.T) (*story, *receiver, func() *unitOfWork) {
	t.Helper()
	s := newStory(t, newDatabase(t), 2)
	r := s.open(t, s.seed)
	t.Cleanup(r.close)
	return s, r, func() *unitOfWork {
		return newUnitOfWork(crypto.NewSQLCryptoStore(r.db, nil, receiverUser.String(), receiverDevice, []byte("pickle")))
	}
}

func TestHashesAreReadBeforeTheyAreWritten(t *testing.T) {
	_, r, other := unitWorld(t)
	ctx := t.Context()
	hash, received := [32]byte{1}, time.UnixMilli(1_700_000_000_000)
	if err := r.uow.PutOlmHash(ctx, hash, received); err != nil {
		t.Fatal(err)
	}
	wantHash := func(u *unitOfWork, want time.Time) {
		t.Helper()
		if got := must(u.GetOlmHash(ctx, hash)); !got.Equal(want) {
			t.Errorf("the hash was received at %v, want %v", got, want)
		}
	}
	wantHash(r.uow, received)
	wantHash(other(), time.Time{})
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	wantHash(r.uow, received)
	wantHash(other(), received)
}

func TestOlmSessionsAreReadBeforeTheyAreWritten(t *testing.T) {
	s, r, other := unitWorld(t)
	ctx, p := t.Context(), s.peers[0]
	first, second := newOlmPair(t, s, r, p), newOlmPair(t, s, r, p)
	second.LastDecryptedTime = second.LastDecryptedTime.Add(time.Minute)
	want := func(u *unitOfWork, ids ...id.SessionID) {
		t.Helper()
		sessions := must(u.GetSessions(ctx, p.senderKey()))
		var got []id.SessionID
		for _, session := range sessions {
			got = append(got, session.ID())
		}
		if !reflect.DeepEqual(got, ids) {
			t.Errorf("sessions %v, want %v", got, ids)
		}
		if u.HasSession(ctx, p.senderKey()) != (len(ids) > 0) {
			t.Errorf("HasSession is wrong with %d sessions", len(ids))
		}
		latest := must(u.GetLatestSession(ctx, p.senderKey()))
		if (latest == nil) != (len(ids) == 0) || latest != nil && latest.ID() != ids[0] {
			t.Errorf("the latest session is %v of %v", latest, ids)
		}
		newest := must(u.GetNewestSessionCreationTS(ctx, p.senderKey()))
		if newest.IsZero() != (len(ids) == 0) {
			t.Errorf("the newest of %d sessions was created at %v", len(ids), newest)
		}
	}
	flush := func() {
		t.Helper()
		if err := r.uow.flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	want(r.uow)
	for _, session := range []*crypto.OlmSession{first, second} {
		if err := r.uow.AddSession(ctx, p.senderKey(), session); err != nil {
			t.Fatal(err)
		}
	}
	want(r.uow, second.ID(), first.ID())
	want(other())
	flush()
	want(r.uow, second.ID(), first.ID())
	want(other(), second.ID(), first.ID())

	// The state of the ratchet is the one of the last update, and the order follows the last decryption.
	if _, _, err := first.Encrypt([]byte("moves the ratchet")); err != nil {
		t.Fatal(err)
	}
	first.LastDecryptedTime = second.LastDecryptedTime.Add(time.Minute)
	if err := r.uow.UpdateSession(ctx, p.senderKey(), first); err != nil {
		t.Fatal(err)
	}
	want(r.uow, first.ID(), second.ID())
	want(other(), second.ID(), first.ID())
	flush()
	stored := must(other().GetLatestSession(ctx, p.senderKey()))
	if stored.ID() != first.ID() || stored.Describe() != first.Describe() {
		t.Errorf("stored is %s, want %s", stored.Describe(), first.Describe())
	}

	if err := r.uow.DeleteSession(ctx, p.senderKey(), first); err != nil {
		t.Fatal(err)
	}
	want(r.uow, second.ID())
	want(other(), first.ID(), second.ID())
	flush()
	want(r.uow, second.ID())
	want(other(), second.ID())
	if err := r.uow.UpdateSession(ctx, p.senderKey(), first); err == nil {
		t.Error("a session was updated that is deleted")
	}
	// mautrix only logs that. What was encrypted with it must not leave.
	if err := r.uow.flush(ctx); !errors.Is(err, ErrUnitOfWorkBroken) {
		t.Errorf("the barrier lets a message pass whose ratchet is not stored: %v", err)
	}
}

func TestDeletedSessionIsNotWrittenThatWasStagedBefore(t *testing.T) {
	s, r, other := unitWorld(t)
	ctx, p := t.Context(), s.peers[0]
	session := newOlmPair(t, s, r, p)
	if err := errors.Join(r.uow.AddSession(ctx, p.senderKey(), session), r.uow.DeleteSession(ctx, p.senderKey(), session), r.uow.flush(ctx)); err != nil {
		t.Fatal(err)
	}
	if other().HasSession(ctx, p.senderKey()) {
		t.Error("the session is stored")
	}
}

func newInbound(t *testing.T, m *megolm, from *actorDevice) *crypto.InboundGroupSession {
	t.Helper()
	session, err := crypto.NewInboundGroupSession(from.senderKey(), from.signingKey(), m.roomID, m.key, 0, 0, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	return session
}

func TestStagedGroupSessionsAreHandedOutAsCopies(t *testing.T) {
	s, r, other := unitWorld(t)
	ctx, m := t.Context(), newMegolm(storyRoom)
	session := newInbound(t, m, s.peers[0].actorDevice)
	if err := r.uow.PutGroupSession(newReceiving(r.Hook).context(ctx), session); err != nil {
		t.Fatal(err)
	}
	if stored := must(other().GetGroupSession(ctx, storyRoom, m.id())); stored != nil {
		t.Error("the session was written before the flush")
	}
	if elsewhere := must(r.uow.GetGroupSession(ctx, "!elsewhere:test", m.id())); elsewhere != nil {
		t.Error("the session is found in another room")
	}
	fresh := string(must(session.Internal.Pickle([]byte("key"))))
	for range 3 {
		handedOut := must(r.uow.GetGroupSession(ctx, storyRoom, m.id()))
		if handedOut == session || handedOut.Internal == session.Internal {
			t.Fatal("the staged session itself was handed out")
		}
		// Exporting and decrypting move the ratchet.
		must(handedOut.Internal.Export(10))
		if _, _, err := handedOut.Internal.Decrypt([]byte(m.message("hello")["ciphertext"].(string))); err != nil {
			t.Fatal(err)
		}
		if handedOut.ID() != session.ID() || handedOut.SenderKey != session.SenderKey || handedOut.SigningKey != session.SigningKey {
			t.Error("the copy is not alike")
		}
		handedOut.RoomID = "!changed:test"
	}
	if string(must(session.Internal.Pickle([]byte("key")))) != fresh {
		t.Error("using a copy has changed the staged session")
	}
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	stored := must(other().GetGroupSession(ctx, storyRoom, m.id()))
	if stored == nil || stored.Internal.FirstKnownIndex() != 0 {
		t.Error("the session was not written as it came")
	}
	if r.uow.stagedGroup(m.id()) != nil {
		t.Error("the session is still staged after the flush")
	}
}

func TestRedactionTakesAStagedSessionAway(t *testing.T) {
	for name, redact := range map[string]func(ctx context.Context, u *unitOfWork, session *crypto.InboundGroupSession) error{
		"one": func(ctx context.Context, u *unitOfWork, session *crypto.InboundGroupSession) error {
			return u.RedactGroupSession(ctx, storyRoom, session.ID(), "test")
		},
		"all of a device": func(ctx context.Context, u *unitOfWork, session *crypto.InboundGroupSession) error {
			_, err := u.RedactGroupSessions(ctx, "", session.SenderKey, "test")
			return err
		},
	} {
		for _, receiving := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, receiving %t", name, receiving), func(t *testing.T) {
				s, r, other := unitWorld(t)
				ctx := t.Context()
				gone, kept := newInbound(t, newMegolm(storyRoom), s.peers[0].actorDevice), newInbound(t, newMegolm(storyRoom), s.peers[1].actorDevice)
				if err := errors.Join(r.uow.PutGroupSession(newReceiving(r.Hook).context(ctx), gone), r.uow.PutGroupSession(newReceiving(r.Hook).context(ctx), kept)); err != nil {
					t.Fatal(err)
				}
				redacting := ctx
				if receiving {
					redacting = newReceiving(r.Hook).context(ctx)
				}
				if err := redact(redacting, r.uow, gone); err != nil {
					t.Fatal(err)
				}
				if session, _ := r.uow.GetGroupSession(ctx, storyRoom, gone.ID()); session != nil {
					t.Error("the redacted session is handed out")
				}
				if err := r.uow.flush(ctx); err != nil {
					t.Fatal(err)
				}
				for _, u := range []*unitOfWork{r.uow, other()} {
					session, err := u.GetGroupSession(ctx, storyRoom, gone.ID())
					if session != nil || !errors.Is(err, crypto.ErrGroupSessionWithheld) || errors.Is(err, errStorage) {
						t.Errorf("the redacted session gives %v, error %v", session, err)
					}
					if session, err = u.GetGroupSession(ctx, storyRoom, kept.ID()); session == nil || err != nil {
						t.Errorf("the other session is gone, error %v", err)
					}
				}
			})
		}
	}
}

func TestReplayedMessageIndexIsRefused(t *testing.T) {
	_, r, other := unitWorld(t)
	ctx := t.Context()
	want := func(u *unitOfWork, eventID id.EventID, index uint, timestamp int64, want bool) {
		t.Helper()
		if got := must(u.ValidateMessageIndex(ctx, "session", eventID, index, timestamp)); got != want {
			t.Errorf("%s at index %d: valid %t, want %t", eventID, index, got, want)
		}
	}
	check := func(u *unitOfWork) {
		t.Helper()
		want(u, "$original", 3, 1000, true)
		want(u, "$replay", 3, 1000, false)
		want(u, "$original", 3, 1001, false)
		want(u, "", 3, 0, false)
	}
	want(r.uow, "", 3, 0, true)
	check(r.uow)
	if n := r.count(`SELECT COUNT(*) FROM crypto_message_index`); n != 0 {
		t.Errorf("%d indices were written before the flush", n)
	}
	if err := r.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	want(other(), "$replay", 3, 1000, false)
	check(other())
	want(other(), "$next", 4, 1000, true)
	if n := r.count(`SELECT COUNT(*) FROM crypto_message_index`); n != 1 {
		t.Errorf("%d indices are stored, want 1", n)
	}
}

// TestHandlersActOnMessagesWhoseIndexIsDurable: a crash after a handler has acted must not open the way for a replay.
func TestHandlersActOnMessagesWhoseIndexIsDurable(t *testing.T) {
	s, _, r, _ := faultyStory(t)
	ctx := t.Context()
	if err := s.feed(ctx, r); err != nil {
		t.Fatal(err)
	}
	handled := 0
	r.onEvent(func(wantedEvent) {
		handled++
		if n := r.count(`SELECT COUNT(*) FROM crypto_message_index`); n < handled {
			t.Errorf("%d indices are stored when the %dth message is handled", n, handled)
		}
	})
	refused.set(writing("crypto_message_index"))
	if err := r.handleAll(ctx); err == nil || handled > 0 {
		t.Errorf("%d messages were handled whose index could not be stored (error %v)", handled, err)
	}
	refused.set(nil)
	if err := r.handleAll(ctx); err != nil || handled != len(s.events) {
		t.Errorf("%d messages were handled of %d (error %v)", handled, len(s.events), err)
	}
}

func TestAccountIsDurableOutsideOfReceiving(t *testing.T) {
	_, r, other := unitWorld(t)
	ctx, mine := t.Context(), r.mach.GetAccount()
	stored := func() string {
		return string(must(must(other().GetAccount(ctx)).Internal.Pickle([]byte("key"))))
	}
	before := stored()
	if err := mine.Internal.GenOneTimeKeys(1); err != nil {
		t.Fatal(err)
	}
	if err := r.uow.PutAccount(newReceiving(r.Hook).context(ctx), mine); err != nil {
		t.Fatal(err)
	}
	if stored() != before {
		t.Error("the account was written while receiving")
	}
	token := r.token(ctx)
	if err := r.uow.PutAccount(ctx, mine); err != nil {
		t.Fatal(err)
	}
	if len(stored()) <= len(before) {
		t.Error("the account was not written outside of receiving")
	}
	if now := r.token(ctx); now != token || token != "t0" {
		t.Errorf("storing the account has made the token %q of %q", now, token)
	}
}

func TestDirectSessionThatBypassedTheHookIsAnError(t *testing.T) {
	s, r, _ := unitWorld(t)
	ctx, device := t.Context(), s.peers[0].actorDevice
	session := newInbound(t, newMegolm(storyRoom), device)
	if err := r.mach.StoreGroupSession(ctx, session); !errors.Is(err, ErrHookBypassed) {
		t.Errorf("the error is %v, want ErrHookBypassed", err)
	}
	if stored := must(r.uow.GetGroupSession(ctx, storyRoom, session.ID())); stored != nil {
		t.Error("the session was stored")
	}
	imported := newInbound(t, newMegolm(storyRoom), device)
	imported.KeySource = id.KeySourceImport
	if err := r.mach.StoreGroupSession(ctx, imported); err != nil {
		t.Error("an imported session was refused: ", err)
	}
	if n := r.count(`SELECT COUNT(*) FROM sendertrust_session WHERE session_id=$1 AND source='import' AND state='unknown_device'`, imported.ID()); n != 1 {
		t.Error("the imported session has no sender data")
	}
}

func TestFlushOfNothingAsksForNothing(t *testing.T) {
	_, _, r, _ := faultyStory(t)
	ctx := t.Context()
	refused.set(transaction("BEGIN"))
	if err := r.uow.flush(ctx); err != nil {
		t.Error("a flush of nothing opened a transaction: ", err)
	}
	if err := r.uow.PutOlmHash(ctx, [32]byte{1}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := r.uow.flush(ctx); err == nil {
		t.Error("a flush of something opened no transaction")
	}
	refused.set(nil)
	if err := r.uow.Flush(ctx); err != nil {
		t.Error(err)
	}
}

func TestNoRequestLeavesWhileReceiving(t *testing.T) {
	s, r, _ := unitWorld(t)
	if err := r.send(newReceiving(r.Hook).context(t.Context()), s.peers[0].device(), "hello"); !errors.Is(err, errNetworkWhileReceiving) {
		t.Errorf("the error is %v", err)
	}
	if len(r.network.requests) > 0 {
		t.Errorf("requests have left: %v", r.network.requests)
	}
}

func TestFlushOfAnotherWaitsForTheWholeMessage(t *testing.T) {
	s, r, _ := unitWorld(t)
	ctx := t.Context()
	s.tell(s.peers[0])
	flushed := make(chan error, 1)
	flushing := make(chan struct{})
	r.mach.CryptoStore = &interrupting{unitOfWork: r.uow, nth: 1, interrupt: func() {
		go func() {
			close(flushing)
			flushed <- r.uow.flush(ctx)
		}()
		<-flushing
	}}
	r.uow.fault = func(at string) error {
		if at == "begun" && len(r.uow.hashes) > 0 && len(r.uow.groups) == 0 {
			t.Error("half a message is being committed")
		}
		return nil
	}
	if err := r.process(ctx, s.Syncs[0]); err != nil {
		t.Fatal(err)
	}
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	if err := s.check(ctx, r); err != nil {
		t.Error(err)
	}
}

func TestImportOfAnEarlierIndexIsMergedIntoADirectSession(t *testing.T) {
	s, r, _ := unitWorld(t)
	ctx, m, p := t.Context(), newMegolm(storyRoom), s.peers[0]
	m.message("moves the ratchet")
	s.Syncs = append(s.Syncs, s.sync([]object{s.encrypt(p, "m.room_key", m.later())}, nil))
	if err := s.feed(ctx, r); err != nil {
		t.Fatal(err)
	}
	earlier := newInbound(t, m, p.actorDevice)
	earlier.KeySource = id.KeySourceBackup
	if err := r.mach.StoreGroupSession(ctx, earlier); err != nil {
		t.Fatal(err)
	}
	if stored := must(r.uow.GetGroupSession(ctx, storyRoom, m.id())); stored.Internal.FirstKnownIndex() != 0 {
		t.Errorf("the first known index is %d", stored.Internal.FirstKnownIndex())
	}
	if claims := must(r.store.claims(ctx, m.id())); len(claims) != 1 || claims[0].State != StateSenderUnverified || claims[0].Source != SourceDirect {
		t.Errorf("sender data %+v", claims)
	}
}

func TestRedactionIsSeenAtOnce(t *testing.T) {
	s, r, _ := unitWorld(t)
	ctx := t.Context()
	s.tell(s.peers[0])
	if err := s.feed(ctx, r); err != nil {
		t.Fatal(err)
	}
	if err := r.uow.RedactGroupSession(ctx, storyRoom, s.keys[0].SessionID, "test"); err != nil {
		t.Fatal(err)
	}
	if session, err := r.uow.GetGroupSession(ctx, storyRoom, s.keys[0].SessionID); session != nil || !errors.Is(err, crypto.ErrGroupSessionWithheld) {
		t.Errorf("the redacted session is still handed out (error %v)", err)
	}
}

// TestStoppingWhileAGapIsFetchedLosesNoEvents ends the program while it asks for what a limited timeline left out.
func TestStoppingWhileAGapIsFetchedLosesNoEvents(t *testing.T) {
	s, r, _ := unitWorld(t)
	s.tell(s.peers[0])
	limited := changed(s.Syncs[0], func(answer object) {
		timeline := answer["rooms"].(object)["join"].(object)[storyRoom.String()].(object)["timeline"].(object)
		timeline["limited"], timeline["prev_batch"] = true, "before"
	})
	ctx, stop := context.WithCancel(t.Context())
	r.network.onMessages = func() object {
		stop()
		return object{"chunk": []any{}}
	}
	if err := r.process(ctx, limited); !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	if token := r.token(t.Context()); token != "t0" {
		t.Fatalf("the token is %s: the gap is never fetched again", token)
	}
	r.network.onMessages = func() object {
		return object{"chunk": []any{object{
			"type": "m.room.message", "event_id": "$missed", "sender": s.peers[1].owner.userID, "content": object{"msgtype": "m.text", "body": "missed"},
		}}}
	}
	if err := r.process(t.Context(), limited); err != nil {
		t.Fatal(err)
	}
	if n := r.count(`SELECT COUNT(*) FROM sendertrust_inbox`); n != 2 {
		t.Errorf("%d events are in the inbox, want 2", n)
	}
}

// A key that is imported while a worse one of the same session waits to be written must not be overwritten by that.
func TestImportDuringASyncIsNotOverwrittenByWhatWasStaged(t *testing.T) {
	s, r, other := unitWorld(t)
	ctx, m, p := t.Context(), newMegolm(storyRoom), s.peers[0]
	earlier := newInbound(t, m, p.actorDevice)
	earlier.KeySource = id.KeySourceBackup
	m.message("moves the ratchet")
	later := must(crypto.NewInboundGroupSession(p.senderKey(), p.signingKey(), storyRoom, m.later()["session_key"].(string), 0, 0, nil, false))
	if err := errors.Join(r.uow.PutGroupSession(newReceiving(r.Hook).context(ctx), later), r.mach.StoreGroupSession(ctx, earlier), r.uow.flush(ctx)); err != nil {
		t.Fatal(err)
	}
	for _, u := range []*unitOfWork{r.uow, other()} {
		if stored := must(u.GetGroupSession(ctx, storyRoom, m.id())); stored.Internal.FirstKnownIndex() != 0 {
			t.Errorf("the first known index is %d", stored.Internal.FirstKnownIndex())
		}
	}
}
