package cryptohook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/crypto/ssss"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// backupServer is an account's homeserver that keeps backups and account data.
type backupServer struct {
	*accountServer
	// storage is the account's secret storage.
	storage *ssss.Key
	// data is the account data, versions are the bodies that backups were made with, by their numbers from 1 on.
	data     map[string]json.RawMessage
	versions []json.RawMessage
	// kept are the entries of the newest version, puts the sizes of the batches they came in.
	kept map[id.SessionID]keptEntry
	puts []int
	// reads counts the entries that were asked for.
	reads int
	// refuse is a session that the server never takes.
	refuse id.SessionID
	// requests are those that change something, in order.
	requests []string
	// fail, if set, says with which status a request fails, and whether it is done all the same; 0: it does not fail.
	fail func(request string) (status int, body string, done bool)
	// say, if set, changes what a request is answered with.
	say func(request string, answer object)
}

// keptEntry is an entry of a backup.
type keptEntry struct {
	roomID id.RoomID
	mautrix.ReqKeyBackupData
}

func newBackupServer(w *trustWorld) *backupServer {
	s := &backupServer{
		accountServer: newAccountServer(w), storage: must(ssss.NewKey("")),
		data: make(map[string]json.RawMessage), kept: make(map[id.SessionID]keptEntry),
	}
	s.take()
	return s
}

// take has the server answer the world, after a restart, too.
func (s *backupServer) take() { s.w.server.other = s.answer }

func (s *backupServer) answer(req *http.Request) (int, []byte) {
	path := strings.Split(strings.TrimPrefix(req.URL.EscapedPath(), "/_matrix/client/v3/"), "/")
	for i, part := range path {
		path[i] = must(url.PathUnescape(part))
	}
	what := req.Method + " " + path[0]
	if path[0] == "room_keys" {
		what += " " + path[1]
	} else if path[0] == "user" && path[2] == "account_data" {
		what = req.Method + " account_data " + path[3]
	} else {
		return s.accountServer.answer(req)
	}
	var body []byte
	if req.Body != nil {
		body = must(io.ReadAll(req.Body))
	}
	var status int
	var failure string
	done := true
	if s.fail != nil {
		status, failure, done = s.fail(what)
	}
	var answer object
	found := true
	if status == 0 || done {
		answer, found = s.serve(what, path, req, body)
	}
	switch {
	case status != 0:
		return status, []byte(failure)
	case !found:
		return http.StatusNotFound, notFound
	}
	if answer["errcode"] != nil {
		return refusals[answer["errcode"]], rawJSON(answer)
	}
	if s.say != nil {
		s.say(what, answer)
	}
	if answer["null"] != nil {
		return http.StatusOK, []byte("null")
	}
	return http.StatusOK, rawJSON(answer)
}

var refusals = map[any]int{"M_WRONG_ROOM_KEYS_VERSION": http.StatusForbidden, "M_INVALID_PARAM": http.StatusBadRequest}

func (s *backupServer) serve(what string, path []string, req *http.Request, body []byte) (answer object, found bool) {
	if req.Method != http.MethodGet {
		s.requests = append(s.requests, what)
	}
	newest := fmt.Sprint(len(s.versions))
	answer = object{}
	switch {
	case what == "POST room_keys version":
		s.versions = append(s.versions, body)
		clear(s.kept)
		return object{"version": fmt.Sprint(len(s.versions))}, true
	case what == "PUT room_keys version":
		s.versions[len(s.versions)-1] = body
	case what == "GET room_keys version":
		if len(s.versions) == 0 {
			return nil, false
		}
		must(0, json.Unmarshal(s.versions[len(s.versions)-1], &answer))
		answer["version"], answer["count"], answer["etag"] = newest, len(s.kept), "1"
	case what == "PUT room_keys keys" && req.URL.Query().Get("version") != newest:
		return object{"errcode": "M_WRONG_ROOM_KEYS_VERSION", "current_version": newest}, true
	case what == "PUT room_keys keys" && s.refuse != "" && strings.Contains(string(body), s.refuse.String()):
		return object{"errcode": "M_INVALID_PARAM"}, true
	case what == "PUT room_keys keys":
		s.puts = append(s.puts, s.put(body))
		answer["count"], answer["etag"] = len(s.kept), fmt.Sprint(len(s.puts))
	case what == "GET room_keys keys":
		s.reads++
		entry, known := s.kept[id.SessionID(path[3])]
		must(0, json.Unmarshal(rawJSON(entry.ReqKeyBackupData), &answer))
		return answer, known && entry.roomID == id.RoomID(path[2])
	case strings.HasPrefix(what, "PUT account_data"):
		s.data[path[3]] = body
	case strings.HasPrefix(what, "GET account_data"):
		if s.data[path[3]] == nil {
			return nil, false
		}
		must(0, json.Unmarshal(s.data[path[3]], &answer))
	}
	return answer, true
}

func (s *backupServer) put(body []byte) (count int) {
	var request mautrix.ReqKeyBackup
	must(0, json.Unmarshal(body, &request))
	for roomID, room := range request.Rooms {
		for sessionID, entry := range room.Sessions {
			s.kept[sessionID] = keptEntry{roomID, entry}
			count++
		}
	}
	return count
}

// secret is the key that is in the secret storage, or nil.
func (s *backupServer) secret() []byte {
	var content ssss.EncryptedAccountDataEventContent
	if s.data[event.AccountDataMegolmBackupKey.Type] == nil {
		return nil
	}
	must(0, json.Unmarshal(s.data[event.AccountDataMegolmBackupKey.Type], &content))
	return must(content.Decrypt(event.AccountDataMegolmBackupKey.Type, s.storage))
}

// keep puts a key into the secret storage.
func (s *backupServer) keep(key *backup.MegolmBackupKey) {
	s.data[event.AccountDataMegolmBackupKey.Type] = rawJSON(ssss.EncryptedAccountDataEventContent{Encrypted: map[string]ssss.EncryptedKeyData{
		s.storage.ID: s.storage.Encrypt(event.AccountDataMegolmBackupKey.Type, key.Bytes()),
	}})
}

// version puts a version of the key's on the server, as another program makes it.
func (s *backupServer) version(key *backup.MegolmBackupKey) {
	s.versions = append(s.versions, rawJSON(object{
		"algorithm": string(id.KeyBackupAlgorithmMegolmBackupV1), "auth_data": object{"public_key": publicKeyOf(key).String()},
	}))
}

func (w *trustWorld) localBackupKey() []byte {
	w.t.Helper()
	if key := must(w.hook.backupKey(w.ctx)); key != nil {
		return key.Bytes()
	}
	return nil
}

// expectBackup makes sure that the secret storage, the database and the server know of one and the same backup.
func (s *backupServer) expectBackup() {
	t := s.w.t
	t.Helper()
	secret, local := s.secret(), s.w.localBackupKey()
	if secret == nil || !bytes.Equal(secret, local) {
		t.Error("the secret storage and the database have different keys")
		return
	}
	if len(s.versions) == 0 {
		t.Error("there is no backup on the server")
		return
	}
	var newest backupVersion
	must(0, json.Unmarshal(s.versions[len(s.versions)-1], &newest))
	if !isOf(&newest, must(backup.MegolmBackupKeyFromBytes(secret))) {
		t.Error("the backup on the server is of another key")
	}
	master := s.w.bot.masterKey()
	if signed, err := signatures.VerifySignatureJSON(newest.AuthData, s.w.bot.userID, master.String(), master); !signed {
		t.Errorf("the backup is not signed by the master key: %v", err)
	}
}

func (s *backupServer) expectSignedByDevice() {
	t := s.w.t
	t.Helper()
	var newest backupVersion
	must(0, json.Unmarshal(s.versions[len(s.versions)-1], &newest))
	key := s.w.hook.mach.GetAccount().SigningKey()
	if signed, err := signatures.VerifySignatureJSON(newest.AuthData, s.w.bot.userID, s.w.client.DeviceID.String(), key); !signed {
		t.Errorf("the backup is not signed by the device: %v", err)
	}
}

// backupCase is what the three places know before.
type backupCase struct {
	// newest, secret and local name the keys that the version on the server, the secret storage and the database have; empty: none.
	newest, secret, local string
	// without: the recovery key is not at hand.
	without bool
	// renew: the account has a new identity.
	renew bool
	want  error
	// requests are those that have to be made, in order.
	requests []string
	// kept names the key of the backup in the end, if it is an old one.
	kept string
}

const (
	storesSecret = "PUT account_data m.megolm_backup.v1"
	makesVersion = "POST room_keys version"
	signsVersion = "PUT room_keys version"
)

var backupCases = map[string]backupCase{
	"nothing":                                 {requests: []string{storesSecret, makesVersion}},
	"crash after the secret storage":          {secret: "a", requests: []string{makesVersion}, kept: "a"},
	"crash after the database":                {secret: "a", local: "a", requests: []string{makesVersion}, kept: "a"},
	"crash after the version":                 {newest: "a", secret: "a", local: "a", requests: []string{signsVersion}, kept: "a"},
	"a new database":                          {newest: "a", secret: "a", requests: []string{signsVersion}, kept: "a"},
	"a new secret storage":                    {newest: "a", local: "a", requests: []string{storesSecret, signsVersion}, kept: "a"},
	"a new secret storage, and no version":    {local: "a", requests: []string{storesSecret, makesVersion}, kept: "a"},
	"another program has renewed it":          {newest: "b", secret: "b", local: "a", requests: []string{signsVersion}, kept: "b"},
	"crash while it is renewed":               {newest: "a", secret: "b", local: "a", requests: []string{makesVersion}, kept: "b"},
	"crash at the end of renewing it":         {newest: "b", secret: "b", local: "a", requests: []string{signsVersion}, kept: "b"},
	"a version was deleted, its key renewed":  {secret: "b", local: "a", requests: []string{makesVersion}, kept: "b"},
	"another's version":                       {newest: "c", want: ErrOthersBackup},
	"another's version, and keys of ours":     {newest: "c", secret: "b", local: "a", want: ErrOthersBackup},
	"another's version beside ours":           {newest: "c", secret: "a", local: "a", want: ErrOthersBackup},
	"renewed, nothing":                        {renew: true, requests: []string{storesSecret, makesVersion}},
	"renewed, ours":                           {renew: true, newest: "a", local: "a", requests: []string{storesSecret, makesVersion}},
	"renewed, ours in the secret storage":     {renew: true, newest: "a", secret: "a", requests: []string{storesSecret, makesVersion}},
	"renewed, ours deleted":                   {renew: true, local: "a", requests: []string{storesSecret, makesVersion}},
	"renewed, another's version":              {renew: true, newest: "c", local: "a", want: ErrOthersBackup},
	"renewed, crash after the secret storage": {renew: true, newest: "a", secret: "b", local: "a", requests: []string{makesVersion}, kept: "b"},
	"renewed, crash after the version":        {renew: true, newest: "b", secret: "b", local: "a", requests: []string{signsVersion}, kept: "b"},

	"without the recovery key, nothing":                {without: true, want: ErrStorageKeyNeeded},
	"without it, crash after the secret storage":       {without: true, secret: "a", want: ErrStorageKeyNeeded},
	"without it, crash after the database":             {without: true, secret: "a", local: "a", requests: []string{makesVersion}, kept: "a"},
	"without it, crash after the version":              {without: true, newest: "a", secret: "a", local: "a", requests: []string{signsVersion}, kept: "a"},
	"without it, a new database":                       {without: true, newest: "a", secret: "a", want: ErrStorageKeyNeeded},
	"without it, the secret storage is empty":          {without: true, local: "a", want: ErrStorageKeyNeeded},
	"without it, another program has renewed it":       {without: true, newest: "b", secret: "b", local: "a", want: ErrStorageKeyNeeded},
	"without it, another's version":                    {without: true, newest: "c", want: ErrOthersBackup},
	"without it, another's version, and a key of ours": {without: true, newest: "c", local: "a", want: ErrOthersBackup},
	"without it, renewed":                              {without: true, renew: true, newest: "a", secret: "a", local: "a", want: ErrStorageKeyNeeded},
	"without it, crash while it is renewed":            {without: true, renew: true, newest: "a", secret: "b", local: "a", want: ErrStorageKeyNeeded},
}

func TestBackupIsMadeFromWhateverIsThere(t *testing.T) {
	for name, c := range backupCases {
		t.Run(name, func(t *testing.T) {
			w := newTrustWorld(t)
			s := newBackupServer(w)
			keys := map[string]*backup.MegolmBackupKey{
				"a": must(backup.NewMegolmBackupKey()), "b": must(backup.NewMegolmBackupKey()), "c": must(backup.NewMegolmBackupKey()),
			}
			if c.newest != "" {
				s.version(keys[c.newest])
			}
			if c.secret != "" {
				s.keep(keys[c.secret])
			}
			if c.local != "" {
				must(0, w.hook.SetBackupKey(w.ctx, keys[c.local].Bytes()))
			}
			before, local, versions := maps.Clone(s.data), w.localBackupKey(), len(s.versions)
			storage := s.storage
			if c.without {
				storage = nil
			}
			if c.renew {
				must(0, w.hook.RenewBackup(w.ctx, w.bot.masterKey()))
			}
			if err := w.hook.KeepBackup(w.ctx, storage); !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if !slices.Equal(s.requests, c.requests) {
				t.Errorf("made the requests %q, want %q", s.requests, c.requests)
			}
			if c.want != nil {
				if len(s.versions) != versions || !maps.EqualFunc(before, s.data, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) || !bytes.Equal(local, w.localBackupKey()) {
					t.Error("something was changed")
				}
				return
			}
			s.expectBackup()
			if c.kept != "" && !bytes.Equal(s.secret(), keys[c.kept].Bytes()) {
				t.Errorf("the backup is not that of key %s", c.kept)
			}
			if c.renew && bytes.Equal(s.secret(), keys["a"].Bytes()) {
				t.Error("the former key is still in use")
			}
			if slices.Contains(c.requests, makesVersion) || slices.Contains(c.requests, signsVersion) {
				s.expectSignedByDevice()
			}
			// Another start finds it as it is.
			s.requests = nil
			w.restart()
			s.take()
			if err := w.hook.KeepBackup(w.ctx, storage); err != nil || len(s.requests) > 0 {
				t.Errorf("the next start: %v, %q", err, s.requests)
			}
		})
	}
}

// Each request of the making of a backup fails: before it is done, or only its answer is lost. The next start goes on.
func TestMakingABackupIsGoneOnFrom(t *testing.T) {
	for _, request := range []string{"GET account_data m.megolm_backup.v1", "GET room_keys version", storesSecret, makesVersion} {
		for _, done := range []bool{false, true} {
			for _, restart := range []bool{false, true} {
				t.Run(fmt.Sprint(request, done, restart), func(t *testing.T) {
					w := newTrustWorld(t)
					s := newBackupServer(w)
					s.fail = func(what string) (int, string, bool) {
						if what == request {
							return http.StatusBadGateway, "<html>", done
						}
						return 0, "", true
					}
					if err := w.hook.KeepBackup(w.ctx, s.storage); err == nil {
						t.Fatal("it did not fail")
					}
					if secret := s.secret(); len(s.versions) > 0 && (secret == nil || !bytes.Equal(secret, w.localBackupKey())) {
						t.Error("there is a version whose key is not safe")
					}
					s.fail = nil
					if restart {
						w.restart()
						s.take()
						must(0, w.hook.KeepBackup(w.ctx, s.storage))
					} else {
						w.clock.advance(firstBackoff)
						w.hook.keeper.pass(w.ctx)
					}
					s.expectBackup()
					if len(s.versions) != 1 {
						t.Errorf("%d versions were made", len(s.versions))
					}
				})
			}
		}
	}
}

// The same while a backup takes the place of another one. Whatever fails, the version that is the newest has its key in the database or in
// the secret storage, and the next start ends with one key for all.
func TestRenewingABackupIsGoneOnFrom(t *testing.T) {
	for _, request := range []string{storesSecret, makesVersion, "GET room_keys version"} {
		for run := range 4 {
			done, restart := run%2 == 0, run/2 == 0
			t.Run(fmt.Sprint(request, done, restart), func(t *testing.T) {
				w := newTrustWorld(t)
				s := newBackupServer(w)
				former := must(backup.NewMegolmBackupKey())
				s.version(former)
				must(0, w.hook.SetBackupKey(w.ctx, former.Bytes()))
				asked := 0
				s.fail = func(what string) (int, string, bool) {
					if what == "GET room_keys version" {
						asked++
					}
					// The first question is what it begins with.
					if what == request && (what != "GET room_keys version" || asked > 1) {
						return http.StatusBadGateway, "<html>", done
					}
					return 0, "", true
				}
				must(0, w.hook.RenewBackup(w.ctx, w.bot.masterKey()))
				if err := w.hook.KeepBackup(w.ctx, s.storage); err == nil {
					t.Fatal("it did not fail")
				}
				s.fail = nil
				if restart {
					w.restart()
					s.take()
					must(0, w.hook.KeepBackup(w.ctx, s.storage))
				} else {
					w.clock.advance(firstBackoff)
					w.hook.keeper.pass(w.ctx)
				}
				s.expectBackup()
				if len(s.versions) > 2 {
					t.Errorf("%d versions were made", len(s.versions)-1)
				}
			})
		}
	}
}

// The process ends after the account has got another identity, and before its backup was renewed: the next start renews it all the same,
// be it later than that, and only once.
func TestCrashBeforeABackupIsRenewedForgetsNothing(t *testing.T) {
	w := newTrustWorld(t)
	s := newBackupServer(w)
	former := must(backup.NewMegolmBackupKey())
	s.version(former)
	must(0, w.hook.SetBackupKey(w.ctx, former.Bytes()))
	must(0, w.hook.RenewBackup(w.ctx, w.bot.masterKey()))
	w.restart()
	s.take()
	if err := w.hook.KeepBackup(w.ctx, nil); !errors.Is(err, ErrStorageKeyNeeded) || len(s.requests) > 0 {
		t.Errorf("without the recovery key: %v, %q", err, s.requests)
	}
	for range 2 {
		w.restart()
		s.take()
		must(0, w.hook.KeepBackup(w.ctx, s.storage))
		s.expectBackup()
	}
	if bytes.Equal(w.localBackupKey(), former.Bytes()) || len(s.versions) != 2 {
		t.Errorf("the former key is still in use, or there are more than two versions: %d", len(s.versions))
	}
}

// An identity that did not come to be renews nothing.
func TestBackupIsNotRenewedForAnotherIdentity(t *testing.T) {
	w := newTrustWorld(t)
	s := newBackupServer(w)
	must(0, w.hook.KeepBackup(w.ctx, s.storage))
	key := w.localBackupKey()
	must(0, w.hook.RenewBackup(w.ctx, newActor("@other:test").masterKey()))
	must(0, w.hook.KeepBackup(w.ctx, s.storage))
	if s.expectBackup(); !bytes.Equal(w.localBackupKey(), key) || len(s.versions) != 1 {
		t.Errorf("it was renewed: %d versions", len(s.versions))
	}
}

// The database fails when it is to store the key: no version is made that only the server would know of.
func TestNoBackupIsMadeWhoseKeyIsNotDurable(t *testing.T) {
	sqliteOnly(t)
	w := newTrustWorld(t)
	s := newBackupServer(w)
	must(w.db.Exec(w.ctx, "CREATE TRIGGER full BEFORE INSERT ON crypto_secrets BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"))
	if err := w.hook.KeepBackup(w.ctx, s.storage); err == nil || len(s.versions) > 0 {
		t.Errorf("error %v, %d versions", err, len(s.versions))
	}
	must(w.db.Exec(w.ctx, "DROP TRIGGER full"))
	w.hook.keeper.pass(w.ctx)
	s.expectBackup()
}

// What a homeserver may answer that is faulty or lies. Nothing is put into what it shows then.
func TestBackupOfAHostileServerIsNotUsed(t *testing.T) {
	other := must(backup.NewMegolmBackupKey())
	for name, say := range map[string]func(answer object){
		"null":                   func(answer object) { answer["null"] = true },
		"another public key":     func(answer object) { answer["auth_data"] = object{"public_key": publicKeyOf(other).String()} },
		"no public key":          func(answer object) { answer["auth_data"] = object{} },
		"auth_data null":         func(answer object) { answer["auth_data"] = nil },
		"auth_data of a text":    func(answer object) { answer["auth_data"] = "x" },
		"another algorithm":      func(answer object) { answer["algorithm"] = "m.megolm_backup.v9" },
		"no version":             func(answer object) { delete(answer, "version") },
		"a version of a number":  func(answer object) { answer["version"] = 7 },
		"a version without end":  func(answer object) { answer["version"] = strings.Repeat("7", 100_000) },
		"a count that is a text": func(answer object) { answer["count"] = "many" },
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := newBackupServer(w)
			key := must(backup.NewMegolmBackupKey())
			s.version(key)
			s.keep(key)
			session := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, session)}})
			s.say = func(what string, answer object) {
				if what == "GET room_keys version" {
					say(answer)
				}
			}
			if err := w.hook.KeepBackup(w.ctx, s.storage); err == nil {
				t.Error("the backup is used")
			}
			w.backUpAll()
			if len(s.puts) > 0 || len(s.requests) > 0 {
				t.Errorf("requests %q", s.requests)
			}
			s.say = nil
			w.clock.advance(lookForAnother)
			w.backUpAll()
			if len(s.kept) != 1 {
				t.Errorf("%d sessions are in the backup once the server is honest", len(s.kept))
			}
		})
	}
}

// A server that takes each backup and shows none is not given one after the other.
func TestBackupThatIsNotShownIsMadeOnce(t *testing.T) {
	w := newTrustWorld(t)
	s := newBackupServer(w)
	s.fail = func(what string) (int, string, bool) {
		if what == "GET room_keys version" {
			return http.StatusNotFound, string(notFound), true
		}
		return 0, "", true
	}
	if err := w.hook.KeepBackup(w.ctx, s.storage); !errors.Is(err, errBackupNotShown) {
		t.Errorf("error %v", err)
	}
	for range 10 {
		w.clock.advance(maxBackoff)
		w.hook.keeper.pass(w.ctx)
	}
	if len(s.versions) != 1 {
		t.Errorf("%d versions were made", len(s.versions))
	}
}
