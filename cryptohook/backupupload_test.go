package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// backUpAll puts everything that waits into the backup, until nothing more is taken.
func (w *trustWorld) backUpAll() {
	w.t.Helper()
	for range 500 {
		w.clock.advance(uploadDelay)
		w.hook.keeper.pass(w.ctx)
		if w.hook.keeper.waiting.Load() == 0 || w.hook.keeper.failures > 0 {
			return
		}
	}
	w.t.Fatal("the backup finds no end")
}

// keptBackup gives the account a backup that the hook keeps.
func keptBackup(t *testing.T, w *trustWorld) *backupServer {
	t.Helper()
	s := newBackupServer(w)
	if err := w.hook.KeepBackup(w.ctx, s.storage); err != nil {
		t.Fatal(err)
	}
	s.requests = nil
	return s
}

// opened is what the backup has of a session, by the key in the secret storage.
func (s *backupServer) opened(sessionID id.SessionID) *backup.MegolmSessionData {
	t := s.w.t
	t.Helper()
	entry, known := s.kept[sessionID]
	if !known {
		t.Fatalf("the backup does not have %s", sessionID)
	}
	var encrypted backup.EncryptedSessionData[backup.MegolmSessionData]
	must(0, json.Unmarshal(entry.SessionData, &encrypted))
	return must(encrypted.Decrypt(must(backup.MegolmBackupKeyFromBytes(s.secret()))))
}

func TestEverySessionIsPutIntoTheBackup(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := keptBackup(t, w)
	bob := newActor("@bob:test").addDevice("BOB")
	bob.crossSigned = false
	w.know(bob.owner)
	proven, unproven, later, imported, disputed := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm("!other:test"), newMegolm(trustRoom), newMegolm(trustRoom)
	later.message("before us")
	w.sync(syncPart{toDevice: []object{
		w.share(alice, proven), w.share(bob, unproven), w.olmEvent(alice, "m.room_key", later.later()), w.share(alice, disputed), w.share(mallory, disputed),
	}})
	w.wantState(unproven, bob, StateDeviceInfo)
	must(0, w.hook.importSession(w.ctx, must(parseExport(exported(t, imported, alice), id.KeySourceImport, "")), new(ImportResult)))
	own := must(w.hook.Encrypt(w.ctx, trustRoom, event.EventMessage, object{"msgtype": "m.text", "body": "hello"})).SessionID
	w.backUpAll()
	for sessionID, want := range map[id.SessionID]struct {
		room     id.RoomID
		verified bool
		first    int
	}{
		proven.id(): {trustRoom, true, 0}, unproven.id(): {trustRoom, false, 0}, later.id(): {"!other:test", true, 1}, imported.id(): {trustRoom, false, 0},
		disputed.id(): {trustRoom, false, 0}, own: {trustRoom, true, 0},
	} {
		data, entry := s.opened(sessionID), s.kept[sessionID]
		if entry.roomID != want.room || entry.IsVerified != want.verified || entry.FirstMessageIndex != want.first || entry.ForwardedCount != 0 {
			t.Errorf("the entry of %s is %+v, want %+v", sessionID, entry, want)
		}
		stored := must(w.hook.uow.SQLCryptoStore.GetGroupSession(w.ctx, want.room, sessionID))
		session := must(olm.InboundGroupSessionImport([]byte(data.SessionKey)))
		if session.ID() != sessionID || session.FirstKnownIndex() != uint32(want.first) || data.SenderKey != stored.SenderKey ||
			data.SenderClaimedKeys.Ed25519 != stored.SigningKey || data.Algorithm != id.AlgorithmMegolmV1 || data.ForwardingKeyChain == nil {
			t.Errorf("the backup has %+v", data)
		}
	}
	if len(s.kept) != 6 {
		t.Errorf("%d sessions are in the backup", len(s.kept))
	}
	if stats := w.hook.Stats(); stats.KeysToBackUp != 0 || !stats.BackedUpAt.Equal(w.clock.Now()) {
		t.Errorf("stats %+v", stats)
	}
	// Nothing is put there twice, after a restart neither.
	puts := len(s.puts)
	w.backUpAll()
	w.restart()
	s.take()
	must(0, w.hook.KeepBackup(w.ctx, nil))
	w.backUpAll()
	if len(s.puts) != puts {
		t.Errorf("batches of %v", s.puts)
	}
}

// Nobody puts anything into a backup before the hook is told to keep one.
func TestBackupIsKeptOnlyIfSomebodyWantsIt(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newBackupServer(w)
	key := must(backup.NewMegolmBackupKey())
	s.version(key)
	must(0, w.hook.SetBackupKey(w.ctx, key.Bytes()))
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	w.hook.keeper.run(w.ctx) // it has nothing to run for
	if len(s.requests) > 0 {
		t.Errorf("requests %q", s.requests)
	}
}

func TestSessionThatIsNotDurableIsNotBackedUp(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	session := newMegolm(trustRoom)
	resp, since := w.response(syncPart{toDevice: []object{w.share(alice, session)}})
	ctx, end := context.WithCancel(w.ctx)
	w.hook.uow.fault = func(string) error { end(); return errors.New("the disk is full") }
	if err := w.client.Syncer.ProcessResponse(ctx, resp, since); err == nil {
		t.Fatal("the commit did not fail")
	}
	if w.hook.uow.stagedGroup(session.id()) == nil {
		t.Fatal("the session is not staged")
	}
	w.backUpAll()
	if len(s.kept) > 0 {
		t.Error("it was put into the backup")
	}
	w.hook.uow.fault = nil
	must(0, w.hook.uow.flush(w.ctx))
	w.backUpAll()
	if len(s.kept) != 1 {
		t.Error("it is not in the backup")
	}
}

// What step H rejects, and what mautrix has deleted, stays out. Another's claim on a session does not put it back in its name.
func TestRejectedAndDeletedSessionsAreNotBackedUp(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := keptBackup(t, w)
	rejected, deleted, condemned := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{
		w.share(alice, rejected, embedding(alice.forgedKeys())), w.share(alice, deleted), w.share(mallory, condemned), w.share(alice, condemned),
	}})
	w.wantState(rejected, alice, StateRejected)
	must(0, w.hook.uow.RedactGroupSession(w.ctx, trustRoom, deleted.id(), "test"))
	claim := w.row(condemned, mallory)
	claim.State, claim.Reason = StateRejected, reasonForgedSignature
	must(0, w.hook.store.write(w.ctx, func(ctx context.Context) error { return w.hook.store.putClaim(ctx, claim) }))
	w.backUpAll()
	if len(s.kept) > 0 || w.hook.Stats().KeysToBackUp > 0 {
		t.Errorf("the backup has %v", s.kept)
	}
}

func TestSessionsFromTheBackupAreNotPutThereAgain(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	found, improved := newMegolm(trustRoom), newMegolm(trustRoom)
	improved.message("the first")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", improved.later())}})
	w.backUpAll()
	if len(s.kept) != 1 || s.kept[improved.id()].FirstMessageIndex != 1 {
		t.Fatalf("the backup has %v", s.kept)
	}
	s.backUpAs(found, exported(t, found, alice))
	if there := must(w.hook.FindKey(w.ctx, trustRoom, found.id())); !there {
		t.Fatal("it was not found")
	}
	w.backUpAll()
	if len(s.puts) != 1 {
		t.Errorf("batches of %v", s.puts)
	}
	// A file brings the beginning of what is in the backup.
	must(0, w.hook.importSession(w.ctx, must(parseExport(exported(t, improved, alice), id.KeySourceImport, "")), new(ImportResult)))
	w.backUpAll()
	if entry := s.kept[improved.id()]; entry.FirstMessageIndex != 0 || !entry.IsVerified {
		t.Errorf("the backup has %+v", entry)
	}
}

// backUpAs puts a session into the backup as another device does.
func (s *backupServer) backUpAs(session *megolm, data *crypto.ExportedSession) {
	key := must(backup.MegolmBackupKeyFromBytes(s.secret()))
	encrypted := must(backup.EncryptSessionData(key, backup.MegolmSessionData{
		Algorithm: data.Algorithm, ForwardingKeyChain: []string{}, SenderKey: data.SenderKey, SessionKey: data.SessionKey,
		SenderClaimedKeys: backup.SenderClaimedKeys{Ed25519: data.SenderClaimedKeys.Ed25519},
	}))
	entry := keptEntry{roomID: session.roomID}
	entry.SessionData = rawJSON(encrypted)
	s.kept[session.id()] = entry
}

// importMany has the hook store sessions that say they are alice's.
func (w *trustWorld) importMany(alice *actorDevice, count int) {
	w.t.Helper()
	for range count {
		must(0, w.hook.importSession(w.ctx, must(parseExport(exported(w.t, newMegolm(trustRoom), alice), id.KeySourceImport, "")), new(ImportResult)))
	}
}

func TestSessionsAreBackedUpInBatches(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 2*sessionsAtOnce+50)
	w.clock.advance(uploadDelay)
	if pause := w.hook.keeper.pass(w.ctx); pause != uploadPause || len(s.puts) != 1 {
		t.Errorf("a pause of %v after batches of %v", pause, s.puts)
	}
	if left := w.hook.Stats().KeysToBackUp; left != sessionsAtOnce+50 {
		t.Errorf("%d are said to wait", left)
	}
	w.hook.keeper.pass(w.ctx)
	if len(s.puts) != 1 {
		t.Error("there was no pause")
	}
	w.backUpAll()
	if fmt.Sprint(s.puts) != "[100 100 50]" || len(s.kept) != 250 {
		t.Errorf("batches of %v", s.puts)
	}
}

// However many sessions wait, only a batch of them is read.
func TestHundredThousandWaitingSessionsAreNotReadAtOnce(t *testing.T) {
	sqliteOnly(t)
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 1)
	must(w.db.Exec(w.ctx, `
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<100000)
		INSERT INTO crypto_megolm_inbound_session (account_id, session_id, sender_key, signing_key, room_id, session, key_source)
		SELECT account_id, substr('00000000' || i, -8) || substr(session_id, 9), sender_key, signing_key, room_id, session, key_source FROM n, crypto_megolm_inbound_session
	`))
	w.clock.advance(uploadDelay)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	w.hook.keeper.pass(w.ctx)
	runtime.ReadMemStats(&after)
	if fmt.Sprint(s.puts) != "[100]" || w.hook.Stats().KeysToBackUp != 99_901 {
		t.Errorf("batches of %v, %d wait", s.puts, w.hook.Stats().KeysToBackUp)
	}
	if used := (after.TotalAlloc - before.TotalAlloc) >> 20; used > 20 {
		t.Errorf("took %d MiB", used)
	}
}

func TestNewVersionOfTheBackupGetsEverything(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 3)
	w.backUpAll()
	// Another device has made a new version with the key in the secret storage.
	s.version(must(backup.MegolmBackupKeyFromBytes(s.secret())))
	clear(s.kept)
	w.importMany(alice, 1)
	w.backUpAll()
	if len(s.kept) > 0 {
		t.Error("the old version was written to")
	}
	w.clock.advance(firstBackoff)
	w.backUpAll()
	if len(s.kept) != 4 {
		t.Errorf("the new version has %d of 4 sessions", len(s.kept))
	}
}

func TestBackupThatAnotherReplacesGetsNothing(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 1)
	w.backUpAll()
	s.version(must(backup.NewMegolmBackupKey()))
	clear(s.kept)
	w.importMany(alice, 1)
	w.backUpAll()
	for range 30 {
		w.clock.advance(lookForAnother)
		w.hook.keeper.pass(w.ctx)
	}
	if len(s.kept) > 0 || len(s.versions) != 2 {
		t.Errorf("another's backup has %d sessions", len(s.kept))
	}
	if told := strings.Count(w.log.String(), "Keys are not backed up"); told != 1 {
		t.Errorf("told %d times", told)
	}
	// It is not thrown away by us; when it is by its owner, and the secret storage is as it was, we go on.
	s.versions = s.versions[:1]
	w.clock.advance(lookForAnother)
	w.backUpAll()
	if len(s.kept) != 1 {
		t.Error("we do not go on")
	}
}

// A server that refuses each batch as of the wrong version, and goes on showing that version, is not asked without end.
func TestBackupThatIsAlwaysOfTheWrongVersionIsTriedByBackOff(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 1)
	tries := 0
	s.fail = func(what string) (int, string, bool) {
		if what == "PUT room_keys keys" {
			tries++
			return http.StatusForbidden, `{"errcode": "M_WRONG_ROOM_KEYS_VERSION", "current_version": "1"}`, false
		}
		return 0, "", true
	}
	for range 60 * 60 {
		w.clock.advance(time.Second)
		w.hook.keeper.pass(w.ctx)
	}
	if tries < 5 || tries > 15 {
		t.Errorf("tried %d times in an hour", tries)
	}
}

func TestFailingUploadIsTriedAgainByBackOff(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 40)
	var sizes []int
	failing := true
	s.fail = func(what string) (int, string, bool) {
		if what == "PUT room_keys keys" && failing {
			sizes = append(sizes, w.hook.keeper.size)
			return http.StatusInternalServerError, `{"errcode": "M_UNKNOWN"}`, false
		}
		return 0, "", true
	}
	for range 60 * 60 {
		w.clock.advance(time.Second)
		w.hook.keeper.pass(w.ctx)
	}
	if len(sizes) < 5 || len(sizes) > 15 || sizes[len(sizes)-1] != 1 {
		t.Errorf("tried batches of %v in an hour", sizes)
	}
	if waiting := w.hook.Stats().KeysToBackUp; waiting != 40 {
		t.Errorf("%d are said to wait", waiting)
	}
	failing = false
	w.clock.advance(maxBackoff)
	w.backUpAll()
	if len(s.kept) != 40 {
		t.Errorf("%d of 40 sessions are in the backup", len(s.kept))
	}
}

// One session that the server never takes keeps no other from being backed up.
func TestSessionThatTheServerRefusesHoldsUpNoOther(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	poison := newMegolm(trustRoom)
	w.importMany(alice, 20)
	must(0, w.hook.importSession(w.ctx, must(parseExport(exported(t, poison, alice), id.KeySourceImport, "")), new(ImportResult)))
	w.importMany(alice, 20)
	s.refuse = poison.id()
	for range 3 * 60 * 60 {
		w.clock.advance(time.Second)
		w.hook.keeper.pass(w.ctx)
	}
	if _, taken := s.kept[poison.id()]; taken || len(s.kept) != 40 {
		t.Errorf("%d of 40 sessions are in the backup", len(s.kept))
	}
	if !strings.Contains(w.log.String(), "refuses to back a session up") || w.hook.Stats().KeysToBackUp != 0 {
		t.Error("nobody was told, or it is tried for ever")
	}
}

// Room IDs in room keys, and where a session begins, are for senders to choose.
func TestUnusualSessionsHoldUpNoOther(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	sessions := []*megolm{newMegolm(trustRoom), newMegolm("nowhere"), newMegolm(id.RoomID("!" + strings.Repeat("x", 60_000))), newMegolm("!new\nline:test")}
	for _, session := range sessions {
		must(0, w.hook.importSession(w.ctx, must(parseExport(exported(t, session, alice), id.KeySourceImport, "")), new(ImportResult)))
	}
	far := newMegolm(trustRoom)
	farthest := exported(t, far, alice)
	half := must(olm.InboundGroupSessionImport(exportOf(t, far.key, math.MaxInt32)))
	farthest.SessionKey = string(must(half.Export(math.MaxUint32 - 1)))
	must(0, w.hook.importSession(w.ctx, must(parseExport(farthest, id.KeySourceImport, "")), new(ImportResult)))
	w.backUpAll()
	if len(s.kept) != 2 || s.kept[farthest.SessionID].FirstMessageIndex != math.MaxInt32 {
		t.Errorf("the backup has %d sessions", len(s.kept))
	}
	if w.hook.Stats().KeysToBackUp != 0 {
		t.Error("they are tried for ever")
	}
}

// What the server says that it has counts: what it has not kept is not called backed up.
func TestHostileAnswersToAnUploadAreNotBelieved(t *testing.T) {
	for name, say := range map[string]func(answer object){
		"null":              func(answer object) { answer["null"] = true },
		"nothing":           func(answer object) { clear(answer) },
		"a count too small": func(answer object) { answer["count"] = 4 },
		"a negative count":  func(answer object) { answer["count"] = -5 },
		"a count of a text": func(answer object) { answer["count"] = "5" },
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := keptBackup(t, w)
			w.importMany(alice, 5)
			s.say = func(what string, answer object) {
				if what == "PUT room_keys keys" {
					say(answer)
				}
			}
			for range 60 * 60 {
				w.clock.advance(time.Second)
				w.hook.keeper.pass(w.ctx)
			}
			if len(s.puts) < 5 || len(s.puts) > 15 || w.hook.Stats().KeysToBackUp != 5 || !w.hook.Stats().BackedUpAt.IsZero() {
				t.Errorf("batches of %v, %d wait", s.puts, w.hook.Stats().KeysToBackUp)
			}
			s.say = nil
			w.clock.advance(maxBackoff)
			w.backUpAll()
			if w.hook.Stats().KeysToBackUp != 0 {
				t.Error("it does not go on")
			}
		})
	}
}

// A better ratchet comes while the worse one is on its way.
func TestSessionThatImprovesDuringItsUploadIsPutThereAgain(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	session := newMegolm(trustRoom)
	session.message("the first")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", session.later())}})
	once := true
	s.fail = func(what string) (int, string, bool) {
		if what == "PUT room_keys keys" && once {
			once = false
			must(0, w.hook.importSession(w.ctx, must(parseExport(exported(t, session, alice), id.KeySourceImport, "")), new(ImportResult)))
		}
		return 0, "", true
	}
	w.backUpAll()
	w.backUpAll()
	if entry := s.kept[session.id()]; entry.FirstMessageIndex != 0 {
		t.Errorf("the backup has %+v", entry)
	}
}

// A key that cannot be decrypted is damage, as everywhere.
func TestDamagedSessionIsNotBackedUp(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	w.importMany(alice, 1)
	must(w.db.Exec(w.ctx, "UPDATE crypto_megolm_inbound_session SET session=$1", []byte("damaged")))
	w.backUpAll()
	if len(s.kept) > 0 || !strings.Contains(w.log.String(), "is damaged (") {
		t.Error("nobody was told")
	}
}

// The worker, as it runs beside the hook.
func TestNewSessionIsBackedUpSoon(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		w.hook.clock = func() time.Time { return w.clock.Now().Add(time.Since(began)) }
		k := newBackupKeeper(w.hook)
		k.wanted = true
		w.hook.keeper = k
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { k.run(ctx); close(ended) }()
		synctest.Wait()
		notify(k.wake)
		w.importMany(alice, 3)
		for range 20 { // a storm of keys does not put it off for ever
			time.Sleep(uploadDelay / 10)
			notify(k.wake)
		}
		synctest.Wait()
		stop()
		<-ended
	})
	if len(s.kept) != 3 {
		t.Errorf("%d of 3 sessions are in the backup", len(s.kept))
	}
}

func TestKeyIsFoundInTheBackupAtOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	session := newMegolm(trustRoom)
	said := w.say(alice, session, "hello")
	s.backUpAs(session, exported(t, session, alice))
	w.wait(said)
	w.changes.take()
	for range 2 {
		if found := must(w.hook.FindKey(w.ctx, trustRoom, session.id())); !found {
			t.Error("it was not found")
		}
	}
	if changed, _ := w.changes.take(); !changed[session.id()] {
		t.Error("nobody was told of the key")
	}
	w.handle()
	seen := w.sawOne(id.EventID(said["event_id"].(string)))
	wantCode(t, seen, CodeAuthenticityNotGuaranteed)
	if seen.body != "hello" || !seen.verdict.Legacy || seen.verdict.Source != SourceBackup {
		t.Errorf("read %q: %+v", seen.body, seen.verdict)
	}
	if reads := s.reads; reads != 1 {
		t.Errorf("looked up %d times", reads)
	}
}

func TestKeyThatIsNotInTheBackupIsNotFound(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newBackupServer(w)
	session, mine := newMegolm(trustRoom), newMegolm(trustRoom)
	mine.message("the first")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", mine.later())}})
	expect := func(room id.RoomID, sessionID id.SessionID, want bool) {
		t.Helper()
		if found := must(w.hook.FindKey(w.ctx, room, sessionID)); found != want {
			t.Errorf("found %v", found)
		}
	}
	expect(trustRoom, session.id(), false) // no backup
	expect(trustRoom, mine.id(), true)     // the later messages of it
	must(0, w.hook.KeepBackup(w.ctx, s.storage))
	expect(trustRoom, session.id(), false)
	expect(trustRoom, id.SessionID(strings.Repeat("../", 20_000)), false)
	s.backUpAs(session, exported(t, session, alice))
	expect("!other:test", session.id(), false)
	forged := exported(t, newMegolm(trustRoom), alice)
	other := newMegolm(trustRoom)
	s.backUpAs(other, forged)
	expect(trustRoom, other.id(), false)
	s.fail = func(what string) (int, string, bool) { return http.StatusBadGateway, "<html>", false }
	if found, err := w.hook.FindKey(w.ctx, trustRoom, session.id()); err == nil || found {
		t.Errorf("found %v: %v", found, err)
	}
	if found, err := w.hook.FindKey(w.ctx, trustRoom, mine.id()); err == nil || !found {
		t.Errorf("found %v: %v", found, err)
	}
	s.fail = nil
	expect(trustRoom, session.id(), true)
}

// The former machine's sessions come back to a new one, which has nothing but the recovery key.
func TestSessionsComeBackToANewDatabase(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := keptBackup(t, w)
	session := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, session)}})
	said := w.say(alice, session, "hello")
	wantCode(t, w.judgeNow(said), CodeUnverifiedIdentity)
	w.backUpAll()

	again := newTrustWorld(t, func(o *Options) { o.PickleKey = []byte("another") })
	again.bot.master, again.bot.selfSigning, again.bot.userSigning = w.bot.master, w.bot.selfSigning, w.bot.userSigning
	again.restart()
	s.w = again
	s.take()
	must(0, again.hook.KeepBackup(again.ctx, s.storage))
	if len(s.versions) != 1 {
		t.Errorf("%d versions were made", len(s.versions))
	}
	again.know(alice.owner)
	again.wait(said)
	again.searchNow()
	again.handle()
	seen := again.sawOne(id.EventID(said["event_id"].(string)))
	wantCode(t, seen, CodeAuthenticityNotGuaranteed)
	if seen.body != "hello" || !seen.verdict.Legacy {
		t.Errorf("read %q: %+v", seen.body, seen.verdict)
	}
	again.backUpAll()
	if len(s.puts) != 1 {
		t.Errorf("batches of %v", s.puts)
	}
}
