package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// newWatchedBot starts a bot that may end by itself: its complaint is no line of the log.
func (w *world) newWatchedBot(t *testing.T, configure func(botproc.Config)) *botproc.Bot {
	t.Helper()
	dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
	bot := must(w.startBot(within(t, patience), dir, configure))(t)
	t.Cleanup(func() {
		bot.Kill()
		if t.Failed() {
			t.Log(bot.Tail(40))
		}
	})
	return bot
}

// endsWith waits until the bot has ended with code 2 and a complaint that has all the words.
func endsWith(t *testing.T, bot *botproc.Bot, words ...string) {
	t.Helper()
	select {
	case <-bot.Exited():
	case <-within(t, patience).Done():
		t.Fatal("the bot has not ended")
	}
	if code := bot.ExitCode(); code != 2 {
		t.Errorf("the bot ended with %d", code)
	}
	if len(bot.LogMentioning(append([]string{"cannot start"}, words...)...)) == 0 {
		t.Errorf("the bot does not say %q", words)
	}
}

// expectNotice waits for a notice that has the words.
func expectNotice(t *testing.T, reader *people.Person, room id.RoomID, words string) {
	t.Helper()
	ok(t, reader.WaitForNotices(within(t, patience), room, func(notices []people.Notice) bool { return mentioning(notices, words) > 0 }))
	for _, notice := range reader.Notices(room) {
		if !notice.Encrypted {
			t.Errorf("a notice went into an encrypted room in the clear: %s", notice.Body)
		}
	}
}

func mentioning(notices []people.Notice, words string) (count int) {
	for _, notice := range notices {
		if strings.Contains(notice.Body, words) {
			count++
		}
	}
	return count
}

// The device is logged out by another device of the account, as its owner or a thief would do. The bot does not come back by itself as
// if nothing had happened.
func TestBotWhoseDeviceIsDeletedEnds(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newWatchedBot(t, nil)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	before := must(alice.Send(within(t, patience), room, say("hello")))(t)
	expect(t, bot, alice, before, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))

	thief := w.login(t, bot.UserID.String(), people.Options{})
	devices := must(thief.Client.GetDevicesInfo(within(t, patience)))(t)
	for _, device := range devices.Devices {
		if device.DeviceID == thief.DeviceID {
			continue
		}
		ok(t, thief.Client.DeleteDevice(within(t, patience), device.DeviceID, &mautrix.ReqDeleteDevice[any]{Auth: mautrix.ReqUIAuthLogin{
			BaseAuthData: mautrix.BaseAuthData{Type: mautrix.AuthTypePassword}, User: bot.UserID.String(), Password: password,
		}}))
	}
	endsWith(t, bot, "was deleted on the server", "change the account's password")
	if len(bot.LogMentioning(`"level":"error"`, "has logged the bot out")) == 0 || len(bot.LogMentioning(`"level":"error"`, "Ending", "was deleted")) == 0 {
		t.Error("the log does not say so loudly")
	}
	after := must(alice.Send(within(t, patience), room, say("are you there?")))(t)
	must(alice.Send(within(t, patience), room, say("hello?")))(t)
	if answers := alice.Answers(after); len(answers) > 0 {
		t.Errorf("answered: %+v", answers)
	}
}

// The account's identity is replaced by somebody who has its password. Until the operator has looked, the bot answers nothing, and each
// room knows why, once; then everything is answered.
func TestBotWhoseIdentityIsReplacedHoldsItsAnswers(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	pinned, pinnedKey := w.newStranger(t, "pinned")
	bot := w.newWatchedBot(t, func(config botproc.Config) { pin(config, pinned.UserID, pinnedKey) })
	room := newRoom(t, true, bot, pinned)
	ctx := within(t, 2*patience)
	verified := func() people.Annotation {
		return proven("verified", "none", "sender_verified", pinned, pinnedKey, sessionID(t, pinned, room))
	}
	before := must(pinned.Send(ctx, room, say("it is me")))(t)
	expect(t, bot, pinned, before, verified())

	thief := w.login(t, bot.UserID.String(), people.Options{})
	must(thief.ResetIdentity(ctx))(t)
	ok(t, bot.WaitForLog(ctx, `"level":"error"`, "another encryption identity", "change the account's password"))
	held := must(pinned.Send(ctx, room, say("is it you?")))(t)
	expectNotice(t, pinned, room, "Do not rely on me")
	if answers := pinned.Answers(held); len(answers) > 0 {
		t.Errorf("answered as if it were trusted: %+v", answers)
	}

	// A restart is no way out.
	_, _, err := bot.Stop(ctx)
	ok(t, err)
	ok(t, bot.Launch())
	endsWith(t, bot, "somebody has reset the account's identity since")

	// The operator decides.
	ok(t, bot.Reconfigure(func(config botproc.Config) { config["account"].(botproc.Config)["reset_identity"] = true }))
	ok(t, bot.Restart(ctx))
	// The new identity has to sign the pinned key first, so that the answer may be better in the end than it was at first.
	want := verified()
	want.EventID = held
	must(pinned.WaitForAnswerThat(ctx, held, func(answer people.Answer) bool { return answer.Annotation == want }))(t)
	expectNotice(t, pinned, room, "answering again")
	expectOnlyAnswers(t, pinned, room, before, held)
	for _, words := range []string{"Do not rely on me", "answering again"} {
		if count := mentioning(pinned.Notices(room), words); count != 1 {
			t.Errorf("%q was said %d times", words, count)
		}
	}
}

// What the account does as it should is no reason for alarm.
func TestBotIsNotAlarmedByWhatIsExpected(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newWatchedBot(t, nil)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	// Another device of the account comes and goes.
	second := w.login(t, bot.UserID.String(), people.Options{})
	settle(t, alice, room)
	ok(t, second.Logout(within(t, patience)))
	settle(t, alice, room)
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	ok(t, bot.Reconfigure(func(config botproc.Config) { config["account"].(botproc.Config)["reset_identity"] = true }))
	ok(t, bot.Restart(within(t, patience)))
	eventID := must(alice.Send(within(t, patience), room, say("hello")))(t)
	expect(t, bot, alice, eventID, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	if lines := bot.LogMentioning("What the homeserver publishes about this account"); len(lines) > 0 {
		t.Error(lines[0])
	}
	if notices := alice.Notices(room); len(notices) > 0 {
		t.Errorf("said %+v", notices)
	}
}

// A homeserver that hides the bot's identity when it starts is not to have it replaced.
func TestHiddenIdentityIsNotReplaced(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	p := must(proxy.Start(w.server.URL))(t)
	t.Cleanup(p.Close)
	bot := w.newWatchedBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": p.URL} })
	watcher := w.login(t, bot.UserID.String(), people.Options{})
	identity := func() id.Ed25519 {
		keys := must(watcher.Client.QueryKeys(within(t, patience), &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{bot.UserID: {}}}))(t)
		master := keys.MasterKeys[bot.UserID]
		return master.FirstKey()
	}
	before := identity()
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	hidden := p.OnAnswer(proxy.KeysQuery, 0, proxy.Edit(func(answer map[string]any) bool {
		answer["master_keys"], answer["self_signing_keys"], answer["user_signing_keys"] = map[string]any{}, map[string]any{}, map[string]any{}
		return true
	}))
	ok(t, bot.Launch())
	ok(t, bot.WaitForLog(within(t, patience), `"level":"error"`, "not making another one"))
	ok(t, hidden.Wait(within(t, patience), 2))
	if now := identity(); now != before {
		t.Fatalf("the identity was replaced: %s, before %s", now, before)
	}
	hidden.Remove()
	ok(t, bot.WaitForLog(within(t, patience), botproc.ReadyMessage))
	if now := identity(); now != before {
		t.Errorf("the identity was replaced: %s, before %s", now, before)
	}
}

// Someone at the server takes the signature off the bot's device: nobody could check its answers any more.
func TestBotWithoutItsSignatureHoldsItsAnswers(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	p := must(proxy.Start(w.server.URL))(t)
	t.Cleanup(p.Close)
	bot := w.newWatchedBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": p.URL} })
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	settle(t, alice, room)
	stripped := p.OnAnswer(proxy.KeysQuery, 0, proxy.Edit(func(answer map[string]any) bool {
		devices, _ := answer["device_keys"].(map[string]any)[bot.UserID.String()].(map[string]any)
		for deviceID, device := range devices {
			keys := device.(map[string]any)
			signatures := keys["signatures"].(map[string]any)[bot.UserID.String()].(map[string]any)
			for name := range signatures {
				if name != "ed25519:"+deviceID {
					delete(signatures, name)
				}
			}
		}
		return len(devices) > 0
	}))
	// Any change of the account's devices has the bot ask.
	ok(t, w.login(t, bot.UserID.String(), people.Options{}).Logout(within(t, patience)))
	ok(t, stripped.Wait(within(t, patience), 1))
	held := must(alice.Send(within(t, patience), room, say("is it you?")))(t)
	expectNotice(t, alice, room, "Do not rely on me")
	if answers := alice.Answers(held); len(answers) > 0 {
		t.Errorf("answered as if it were trusted: %+v", answers)
	}
	stripped.Remove()
	over := time.Now()
	expect(t, bot, alice, held, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	if took := time.Since(over); took > 20*time.Second {
		t.Errorf("answered %v after it was over", took)
	}
	expectNotice(t, alice, room, "answering again")
}
