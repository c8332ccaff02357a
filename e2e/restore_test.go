package e2e

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// restoreStage is a bot that has talked, and will lose what it has: alice has spoken to it, with a session of her own, and somebody looks
// on with Element.
type restoreStage struct {
	*world
	bot     *botproc.Bot
	alice   *people.Person
	watcher *element.Client
	room    id.RoomID
	// session is the one that said was sent with; answer is the bot's, with its own session.
	session      *people.Session
	said, answer id.EventID
	masterKey    id.Ed25519
	// identity is the bot's master key.
	identity id.Ed25519
}

func newRestoreStage(t *testing.T) *restoreStage {
	t.Helper()
	w := theWorld(t)
	s := &restoreStage{world: w, bot: w.newBot(t, nil), watcher: w.newElement(t, "watcher")}
	s.alice, s.masterKey = w.newStranger(t, "alice")
	ctx := within(t, 2*patience)
	must(s.watcher.BootstrapCrossSigning(ctx))(t)
	s.room = newRoom(t, true, s.bot, s.alice)
	ok(t, s.alice.Invite(ctx, s.room, s.watcher.UserID()))
	ok(t, s.watcher.Join(ctx, s.room))
	ok(t, s.alice.WaitJoined(ctx, s.room, s.watcher.UserID()))
	s.session = must(s.alice.NewSession(s.room))(t)
	ok(t, s.alice.ShareKey(ctx, s.session, s.bot.UserID))
	s.said = must(s.alice.SendWith(ctx, s.session, say("before the loss")))(t)
	s.answer = expect(t, s.bot, s.alice, s.said, unverifiedIdentity(s.alice, s.masterKey, s.session.ID)).EventID
	s.expectNoShield(t, s.answer)
	s.identity = must(s.watcher.MasterKey(ctx, s.bot.UserID))(t)
	s.waitUntilBackedUp(t, s.session.ID, sessionOf(t, s.alice, s.room, s.answer))
	return s
}

// login is a device of the bot's account that somebody else has.
func (s *restoreStage) login(t *testing.T) *mautrix.Client {
	t.Helper()
	client := must(mautrix.NewClient(s.server.URL, "", ""))(t)
	must(client.Login(within(t, patience), &mautrix.ReqLogin{
		Type: mautrix.AuthTypePassword, Identifier: mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: s.bot.UserID.String()},
		Password: password, StoreCredentials: true,
	}))(t)
	return client
}

// waitUntilBackedUp waits until the backup of the bot's account has sessions.
func (s *restoreStage) waitUntilBackedUp(t *testing.T, sessions ...id.SessionID) {
	t.Helper()
	client, ctx := s.login(t), within(t, patience)
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for _, session := range sessions {
		for !inBackup(ctx, client, &people.Session{RoomID: s.room, ID: session}) {
			select {
			case <-ctx.Done():
				t.Fatalf("the bot did not back %s up: %v", session, context.Cause(ctx))
			case <-again.C:
			}
		}
	}
	must(client.Logout(ctx))(t)
}

// expectNoShield makes sure that Element warns of nothing beside an answer of the bot's.
func (s *restoreStage) expectNoShield(t *testing.T, answer id.EventID) {
	t.Helper()
	if shields := must(s.watcher.Shield(within(t, patience), answer))(t); shields.Lax != (element.Shield{Colour: "none"}) {
		t.Errorf("Element shows %+v beside the bot's answer", shields.Lax)
	}
}

// loseDatabase stops the bot and deletes all that it has, but its configuration.
func (s *restoreStage) loseDatabase(t *testing.T) {
	t.Helper()
	_, _, err := s.bot.Stop(within(t, patience))
	ok(t, err)
	for _, file := range must(filepath.Glob(s.bot.DBPath() + "*"))(t) {
		ok(t, os.Remove(file))
	}
}

// recoveryKey is what the bot has written into its configuration.
func (s *restoreStage) recoveryKey(t *testing.T) string {
	t.Helper()
	key, _ := must(s.bot.Config())(t)["account"].(botproc.Config)["recovery_key"].(string)
	if !strings.HasPrefix(key, "Es") {
		t.Fatal("the bot has no recovery key in its configuration")
	}
	return key
}

// expectRestored makes sure that the bot is who it was, and can read what was said before. It gives the lines that this start logged.
func (s *restoreStage) expectRestored(t *testing.T, earlier int) (log []string) {
	t.Helper()
	ctx := within(t, 2*patience)
	// What its first /sync shows was said before its time.
	ok(t, s.bot.WaitForLog(ctx, "/_matrix/client/v3/sync", "Request completed"))
	if now := must(s.watcher.MasterKey(ctx, s.bot.UserID))(t); now != s.identity {
		t.Errorf("the bot's master key is %s, and was %s", now, s.identity)
	}
	// The session's key was given to the former device only.
	old := must(s.alice.SendWith(ctx, s.session, say("with the old key")))(t)
	answer := expect(t, s.bot, s.alice, old, hearsay(s.session.ID))
	if !contains(answer.Body, "key backup on the server") {
		t.Errorf("the answer does not say where the key came from: %s", answer.Body)
	}
	s.expectNoShield(t, answer.EventID)
	s.alice.RotateSession(s.room)
	fresh := must(s.alice.Send(ctx, s.room, say("with a new key")))(t)
	answer = expect(t, s.bot, s.alice, fresh, unverifiedIdentity(s.alice, s.masterKey, sessionID(t, s.alice, s.room)))
	s.expectNoShield(t, answer.EventID)
	return s.bot.Log()[earlier:]
}

// linesWith gives the lines that have all the words.
func linesWith(lines []string, words ...string) (found []string) {
	for _, line := range lines {
		if contains(line, words...) {
			found = append(found, line)
		}
	}
	return found
}

// expectNoWarning makes sure that there is nothing to worry about. That the former device has no one-time keys left is none.
func expectNoWarning(t *testing.T, log []string) {
	t.Helper()
	for _, line := range append(linesWith(log, `"level":"warn"`), linesWith(log, `"level":"error"`)...) {
		if !contains(line, "Didn't find olm session to encrypt group session") {
			t.Errorf("warned: %s", line)
		}
	}
}

// A new machine has nothing but the configuration, with the recovery key that the bot has written there.
func TestBotIsRestoredOnANewMachine(t *testing.T) {
	t.Parallel()
	s := newRestoreStage(t)
	former := s.deviceIDs(t)
	s.loseDatabase(t)
	earlier := len(s.bot.Log())
	ok(t, s.bot.Restart(within(t, patience)))
	log := s.expectRestored(t, earlier)
	expectNoWarning(t, log)
	if told := linesWith(log, `"other_devices":1`, former[0].String()); len(told) != 1 {
		t.Errorf("the former device %s is not told of, once: %q", former, linesWith(log, "other_devices"))
	}
	if made := s.bot.LogMentioning("Made a key backup for the account"); len(made) != 1 {
		t.Errorf("%d backups were made", len(made))
	}
	s.expectReadable(t)
}

// deviceIDs are the devices of the bot's account.
func (s *restoreStage) deviceIDs(t *testing.T) (devices []id.DeviceID) {
	t.Helper()
	client := s.login(t)
	for _, device := range must(client.GetDevicesInfo(within(t, patience)))(t).Devices {
		if device.DeviceID != client.DeviceID {
			devices = append(devices, device.DeviceID)
		}
	}
	must(client.Logout(within(t, patience)))(t)
	return devices
}

// expectReadable makes sure that a hook on the bot's account, with its recovery key, reads the message that was said before any of this.
func (s *restoreStage) expectReadable(t *testing.T) {
	t.Helper()
	ctx := within(t, 2*patience)
	client := s.login(t)
	db := must(dbutil.NewWithDialect("file:"+filepath.Join(t.TempDir(), "hook.db")+"?_txlock=immediate", "sqlite3-fk-wal"))(t)
	t.Cleanup(func() { _ = db.Close() })
	owner := must(cryptohook.Own(ctx, db))(t)
	t.Cleanup(func() { ok(t, owner.Release()) })
	hook := must(cryptohook.Install(ctx, client, cryptohook.Options{DB: db, Owner: owner, PickleKey: []byte("pickle")}))(t)
	mach := hook.Machine()
	keyID, keyData, err := mach.SSSS.GetDefaultKeyData(ctx)
	ok(t, err)
	storage := must(keyData.VerifyRecoveryKey(keyID, s.recoveryKey(t)))(t)
	ok(t, mach.FetchCrossSigningKeysFromSSSS(ctx, storage))
	ok(t, hook.KeepBackup(ctx, storage))

	evt := must(client.GetEvent(ctx, s.room, s.said))(t)
	evt.RoomID = s.room
	if found := must(hook.FindKey(ctx, s.room, s.session.ID))(t); !found {
		t.Fatal("the key is not in the backup")
	}
	examined := must(hook.Examine(ctx, evt))(t)
	if v := examined.Verdict; v.Code != cryptohook.CodeAuthenticityNotGuaranteed || !v.Legacy || v.Source != cryptohook.SourceBackup {
		t.Errorf("the verdict is %+v", v)
	}
	ok(t, evt.Content.ParseRaw(event.EventEncrypted))
	if text := must(hook.Decrypt(ctx, evt))(t).Content.AsMessage().Body; text != say("before the loss") {
		t.Errorf("read %q", text)
	}
	must(client.Logout(ctx))(t)
}

// The bot is given the token of a login that somebody made for it.
func TestBotIsRestoredWithANewToken(t *testing.T) {
	t.Parallel()
	s := newRestoreStage(t)
	s.loseDatabase(t)
	client := s.login(t)
	ok(t, s.bot.Reconfigure(func(config botproc.Config) {
		account := config["account"].(botproc.Config)
		delete(account, "password")
		account["access_token"] = client.AccessToken
	}))
	earlier := len(s.bot.Log())
	ok(t, s.bot.Restart(within(t, patience)))
	log := s.expectRestored(t, earlier)
	if ready := linesWith(log, botproc.ReadyMessage, client.DeviceID.String()); len(ready) != 1 {
		t.Errorf("the bot is not device %s", client.DeviceID)
	}
	expectNoWarning(t, log)
}

// The bot gets a device with a name that the operator chooses.
func TestBotIsRestoredAsAnotherDevice(t *testing.T) {
	t.Parallel()
	s := newRestoreStage(t)
	s.loseDatabase(t)
	ok(t, s.bot.Reconfigure(func(config botproc.Config) { config["account"].(botproc.Config)["device_id"] = "ROTATED" }))
	earlier := len(s.bot.Log())
	ok(t, s.bot.Restart(within(t, patience)))
	log := s.expectRestored(t, earlier)
	if ready := linesWith(log, botproc.ReadyMessage, `"device_id":"ROTATED"`); len(ready) != 1 {
		t.Error("the bot is not the device that it was told to be")
	}
	expectNoWarning(t, log)
}

// The operator logs in to the bot's account with Element, and gives it the recovery key.
func TestElementTrustsTheBackupOfTheBot(t *testing.T) {
	t.Parallel()
	s := newRestoreStage(t)
	operator := s.newElementDevice(t, s.bot.UserID.String())
	ctx := within(t, 2*patience)
	if before := must(operator.KeyBackup(ctx))(t); before.Version == "" || before.MatchesKey {
		t.Errorf("before it has the recovery key, Element holds of the backup: %+v", before)
	}
	if identity := must(operator.UseRecovery(ctx, s.recoveryKey(t)))(t); identity != s.identity {
		t.Errorf("Element has restored the identity %s", identity)
	}
	backup := must(operator.KeyBackup(ctx))(t)
	if !backup.Trusted || !backup.MatchesKey || backup.Active != backup.Version {
		t.Errorf("Element holds of the backup: %+v", backup)
	}
	for _, eventID := range []id.EventID{s.said, s.answer} {
		evt := must(operator.WaitForEvent(ctx, eventID))(t)
		if eventID == s.said && !strings.Contains(string(evt.Content), "before the loss") {
			t.Errorf("Element reads %s", evt.Content)
		}
	}
}

// A backup of another program's, without its key in the secret storage, is left alone. The operator is told once.
func TestBackupOfAnotherProgramIsLeftAlone(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	account := w.newElement(t, "owned")
	ctx := within(t, 2*patience)
	_, recoveryKey, err := account.SetUpRecovery(ctx, true)
	ok(t, err)
	client := must(mautrix.NewClient(w.server.URL, account.UserID(), account.AccessToken()))(t)
	before := must(client.GetKeyBackupLatestVersion(ctx))(t)
	ok(t, client.SetAccountData(ctx, event.AccountDataMegolmBackupKey.Type, map[string]any{}))
	bot := w.newBotOf(t, account.UserID(), recoveryKey)
	_, _, err = bot.Stop(ctx)
	ok(t, err)
	if told := bot.LogMentioning(`"level":"warn"`, "left alone", "account.recovery_key"); len(told) != 1 {
		t.Errorf("told: %q", told)
	}
	if after := must(client.GetKeyBackupLatestVersion(ctx))(t); after.Version != before.Version || after.AuthData.PublicKey != before.AuthData.PublicKey {
		t.Errorf("the backup was replaced by %+v", after)
	}
}

// A bot that is given a new identity, and is killed as soon as that is published, does not go on with the backup that the former recovery
// key opens.
func TestBackupIsRenewedAfterACrash(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	p := must(proxy.Start(w.server.URL))(t)
	t.Cleanup(p.Close)
	bot := w.newBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": p.URL} })
	other, ctx := w.login(t, bot.UserID.String(), people.Options{}), within(t, 2*patience)
	before := must(other.Client.GetKeyBackupLatestVersion(ctx))(t)
	_, _, err := bot.Stop(ctx)
	ok(t, err)
	must(other.BootstrapCrossSigning(ctx))(t) // somebody has got into the account: the bot has to have its identity replaced
	ok(t, bot.Reconfigure(func(config botproc.Config) {
		config["account"].(botproc.Config)["reset_identity"], config["account"].(botproc.Config)["recovery_key"] = true, "generate"
	}))
	var published atomic.Bool
	p.OnAnswer("POST v3/keys/device_signing/upload", 1, func(_ *proxy.Request, answer *proxy.Answer) bool {
		published.Store(answer.Status == http.StatusOK)
		return published.Load()
	})
	cut := p.OnRequest(proxy.Anything, 0, func(*proxy.Request) *proxy.Answer {
		if !published.Load() {
			return nil
		}
		return proxy.Page(http.StatusBadGateway)
	})
	ok(t, bot.Launch())
	ok(t, cut.Wait(ctx, 1))
	bot.Kill()
	cut.Remove()
	if between := must(other.Client.GetKeyBackupLatestVersion(ctx))(t); between.Version != before.Version {
		t.Fatal("the backup was renewed before the crash")
	}
	ok(t, bot.Restart(ctx))
	if after := must(other.Client.GetKeyBackupLatestVersion(ctx))(t); after.Version == before.Version || after.AuthData.PublicKey == before.AuthData.PublicKey {
		t.Errorf("the bot goes on with the former backup: %+v", after)
	}
}
