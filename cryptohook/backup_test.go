package cryptohook

import (
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/id"
)

func unpaddedBase64(raw []byte) string { return base64.RawStdEncoding.EncodeToString(raw) }

// withBackup gives the account a key backup that the bot has the key of.
func withBackup(t *testing.T, w *trustWorld) *accountServer {
	t.Helper()
	server := newAccountServer(w)
	server.backupKey = must(backup.NewMegolmBackupKey())
	if err := w.hook.SetBackupKey(w.ctx, server.backupKey.Bytes()); err != nil {
		t.Fatal(err)
	}
	return server
}

// backUp puts a session into the backup, as whoever knows the public key can.
func (s *accountServer) backUp(sessionID id.SessionID, data *crypto.ExportedSession) {
	encrypted := must(backup.EncryptSessionDataWithPubkey(s.backupKey.PublicKey(), object{
		"algorithm": string(data.Algorithm), "sender_key": data.SenderKey.String(), "session_key": data.SessionKey,
		"sender_claimed_keys": object{"ed25519": data.SenderClaimedKeys.Ed25519.String()}, "forwarding_curve25519_key_chain": []any{},
	}))
	s.entries[sessionID] = rawJSON(object{"first_message_index": 0, "forwarded_count": 0, "is_verified": true, "session_data": encrypted})
}

func TestMissingKeyIsFoundInTheBackup(t *testing.T) {
	for _, restart := range []bool{false, true} {
		w, alice, _ := twoPeople(t)
		server := withBackup(t, w)
		w.element()
		s := newMegolm(trustRoom)
		server.backUp(s.id(), exported(t, s, alice))
		said := w.say(alice, s, "hello")
		w.wait(said)
		if restart {
			w.restart()
			w.handle()
		}
		w.changes.take()
		w.searchNow()
		if changed, _ := w.changes.take(); !changed[s.id()] {
			t.Error("nobody was told of the key")
		}
		w.handle()
		seen := w.sawOne(id.EventID(said["event_id"].(string)))
		wantCode(t, seen, CodeAuthenticityNotGuaranteed)
		if seen.body != "hello" || seen.verdict.Source != SourceBackup || !seen.verdict.Legacy {
			t.Errorf("read %q: %+v", seen.body, seen.verdict)
		}
		if len(server.sent) > 0 {
			t.Error("other devices were asked for what the backup has")
		}
		if stored := w.storedKey(s, trustRoom); stored.KeyBackupVersion != "7" {
			t.Errorf("the key is of backup version %q: it would be backed up again", stored.KeyBackupVersion)
		}
	}
}

// We have the key from a later message on, and the backup has all of it.
func TestBackupIsAskedForTheBeginningOfASession(t *testing.T) {
	w, alice, _ := twoPeople(t)
	server := withBackup(t, w)
	s := newMegolm(trustRoom)
	early := w.say(alice, s, "early")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}})
	server.backUp(s.id(), exported(t, s, alice))
	w.wait(early)
	w.searchNow()
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.verdict.Source != SourceDirect || seen.body != "early" {
		t.Errorf("read %q: %+v", seen.body, seen.verdict)
	}
}

func TestBackupIsTakenOnlyIfItIsOurs(t *testing.T) {
	for name, change := range map[string]func(w *trustWorld, server *accountServer){
		"there is none": func(_ *trustWorld, server *accountServer) { server.backupKey = nil },
		"another public key": func(_ *trustWorld, server *accountServer) {
			server.backupKey = must(backup.NewMegolmBackupKey())
		},
		"we have no private key": func(w *trustWorld, _ *accountServer) {
			if err := w.hook.uow.DeleteSecret(w.ctx, id.SecretMegolmBackupV1); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			server := withBackup(t, w)
			s := newMegolm(trustRoom)
			change(w, server)
			w.wait(w.say(alice, s, "hello"))
			w.searchNow()
			if len(server.lookUps) > 0 || w.storedKey(s, trustRoom) != nil {
				t.Error("keys were looked up in the backup")
			}
		})
	}
}

func TestBackupEntriesThatAreNotValidHarmNothing(t *testing.T) {
	other := newMegolm(trustRoom)
	for name, forge := range map[string]func(server *accountServer, s *megolm, good *crypto.ExportedSession){
		"another session": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SessionKey = string(exportOf(t, other.key, 0))
			server.backUp(s.id(), good)
		},
		"another algorithm": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.Algorithm = "m.megolm.v9"
			server.backUp(s.id(), good)
		},
		"no sender key": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SenderKey = ""
			server.backUp(s.id(), good)
		},
		"no claimed key": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SenderClaimedKeys.Ed25519 = ""
			server.backUp(s.id(), good)
		},
		"a sender key that is none": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SenderKey = id.SenderKey(strings.Repeat("A", 100_000))
			server.backUp(s.id(), good)
		},
		"an export that does not parse": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SessionKey = good.SessionKey[:40]
			server.backUp(s.id(), good)
		},
		"a session key instead of an export": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			good.SessionKey = s.key
			server.backUp(s.id(), good)
		},
		"no ephemeral key": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = rawJSON(object{"session_data": object{"ciphertext": "AAAA", "mac": "AAAA"}})
		},
		"the ephemeral key null": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = rawJSON(object{"session_data": object{"ciphertext": "AAAA", "mac": "AAAA", "ephemeral": nil}})
		},
		"an ephemeral key of order one": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = rawJSON(object{"session_data": object{"ciphertext": "AAAA", "mac": "AAAA", "ephemeral": unpaddedBase64(make([]byte, 32))}})
		},
		"encrypted for another key": func(server *accountServer, s *megolm, good *crypto.ExportedSession) {
			ours := server.backupKey
			server.backupKey = must(backup.NewMegolmBackupKey())
			server.backUp(s.id(), good)
			server.backupKey = ours
		},
		"no session data": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = []byte(`{}`)
		},
		"no JSON": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = []byte(`<html>`)
		},
		"the JSON null": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = []byte(`null`)
		},
		"session data that is not": func(server *accountServer, s *megolm, _ *crypto.ExportedSession) {
			server.entries[s.id()] = []byte(`{"session_data": "x"}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			server := withBackup(t, w)
			s, good := newMegolm(trustRoom), newMegolm(trustRoom)
			forge(server, s, exported(t, s, alice))
			server.backUp(good.id(), exported(t, good, alice))
			w.wait(w.say(alice, s, "hello"))
			w.wait(w.say(alice, good, "a good one"))
			w.searchNow()
			if len(w.claims(s)) > 0 || w.storedKey(s, trustRoom) != nil {
				t.Error("the entry was taken")
			}
			if !strings.Contains(w.log.String(), "Ignoring an entry of the key backup") {
				t.Error("nobody was told")
			}
			if w.storedKey(good, trustRoom) == nil {
				t.Error("a good entry was not taken")
			}
			// It is not asked for again and again, and the owner's own key is welcome.
			lookUps := len(server.lookUps)
			w.clock.advance(time.Minute)
			w.handle()
			w.searchNow()
			if len(server.lookUps) != lookUps {
				t.Error("the entry was asked for again")
			}
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.wantState(s, alice, StateSenderUnverified)
		})
	}
}

func TestFailingBackupIsAskedAgainByBackOff(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.KeyWait = time.Hour })
	server := withBackup(t, w)
	s := newMegolm(trustRoom)
	server.backUp(s.id(), exported(t, s, alice))
	said := w.say(alice, s, "hello")
	w.wait(said)
	server.down = true
	w.searchNow()
	w.searchNow()
	if tried := w.server.count("room_keys/version"); tried != 1 {
		t.Errorf("tried %d times within seconds", tried)
	}
	w.clock.advance(firstBackoff)
	w.searchNow()
	if tried := w.server.count("room_keys/version"); tried != 2 {
		t.Errorf("tried %d times", tried)
	}
	server.down = false
	w.clock.advance(2 * firstBackoff)
	w.searchNow()
	w.handle()
	wantCode(t, w.sawOne(id.EventID(said["event_id"].(string))), CodeAuthenticityNotGuaranteed)
}

// The server may know the version, and fail at the key.
func TestFailingBackupEntryIsAskedAgainByBackOff(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.KeyWait = time.Hour })
	server := withBackup(t, w)
	s := newMegolm(trustRoom)
	server.backUp(s.id(), exported(t, s, alice))
	w.wait(w.say(alice, s, "hello"))
	failing := true
	w.server.other = func(req *http.Request) (int, []byte) {
		if failing && strings.Contains(req.URL.Path, "/room_keys/keys/") {
			return http.StatusInternalServerError, []byte(`{"errcode": "M_UNKNOWN"}`)
		}
		return server.answer(req)
	}
	w.searchNow()
	failing = false
	w.searchNow()
	if len(server.lookUps) > 0 {
		t.Error("asked again at once")
	}
	w.clock.advance(firstBackoff)
	w.searchNow()
	if w.storedKey(s, trustRoom) == nil {
		t.Error("the key was not looked up again")
	}
}

func TestBackupKeyThatIsNoneIsRefused(t *testing.T) {
	w := newTrustWorld(t)
	if err := w.hook.SetBackupKey(w.ctx, []byte("short")); err == nil {
		t.Error("it was taken")
	}
}
