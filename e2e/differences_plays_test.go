package e2e

import (
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// playDifferences plays all scenarios: most at once, each in a room of its own; last those that disturb the others.
func playDifferences(t *testing.T, w *world, table *differencesTable) {
	s := newDifferencesStage(t, w, table)
	t.Run("at once", func(t *testing.T) {
		for _, scenario := range []struct {
			name string
			play func(*testing.T)
		}{ // the long ones first
			{"history", s.playHistory}, {"attacks", s.playAttacks}, {"unreadable", s.playUnreadable}, {"backup", s.playBackup},
			{"forgery", s.playForgery}, {"verified", s.playVerified}, {"late key", s.playLateKey}, {"reset", s.playReset},
			{"no identity", s.playNoIdentity}, {"stranger", s.playStranger}, {"second device", s.playSecondDevice}, {"clear room", s.playClearRoom},
			{"rotated, signed again", s.playRotated}, {"rotated, not signed again", s.playRotatedAway},
		} {
			t.Run(scenario.name, func(t *testing.T) {
				t.Parallel()
				scenario.play(t)
			})
		}
	})
	t.Run("logged out", s.playLoggedOut)
	t.Run("withdrawn", s.playWithdrawn)
}

func (s *differencesStage) playStranger(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	s.judge(t, "stranger", alice, must(alice.Send(ctx, room, say("hello")))(t))
	session := must(alice.NewSession(room))(t)
	s.share(t, alice, session, people.OmitDeviceKeys())
	s.judge(t, "stranger, old app", alice, must(alice.SendWith(ctx, session, say("an old app")))(t))
	s.judge(t, "plaintext", alice, must(alice.SendClear(ctx, room, say("oops")))(t))
}

func (s *differencesStage) playAttacks(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	mallory, _ := s.w.newStranger(t, "mallory")
	room := s.room(t, true, alice, mallory)
	original := must(alice.Send(ctx, room, say("I owe Mallory nothing")))(t)
	must(alice.WaitForAnswer(ctx, original))(t)
	s.judge(t, "sent on", alice, must(mallory.Resend(ctx, room, original))(t))
	s.judge(t, "repeated", alice, must(alice.Resend(ctx, room, original))(t))

	stolen := must(alice.NewSession(room))(t)
	s.share(t, alice, stolen)
	encrypted := must(alice.Encrypt(stolen, "m.room.message", map[string]any{"msgtype": "m.text", "body": say("intercepted")}))(t)
	s.judge(t, "intercepted", alice, must(mallory.SendRaw(ctx, room, "m.room.encrypted", encrypted))(t))

	disputed := must(alice.CurrentSession(ctx, room))(t)
	s.share(t, mallory, disputed)
	s.judge(t, "two claim it", alice, must(alice.Send(ctx, room, say("mine")))(t))

	snatched := must(alice.NewSession(room))(t)
	s.share(t, mallory, snatched)
	s.share(t, alice, snatched)
	s.judge(t, "two claim it, the thief first", alice, must(alice.SendWith(ctx, snatched, say("mine, too")))(t))

	elsewhere := must(alice.Encrypt(disputed, "m.room.message", map[string]any{"msgtype": "m.text", "body": say("to others")}))(t)
	other := s.room(t, true, alice)
	s.judge(t, "moved to another room", alice, must(alice.SendRaw(ctx, other, "m.room.encrypted", elsewhere))(t))
}

func (s *differencesStage) playForgery(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	thief := s.w.login(t, alice.UserID.String(), people.Options{})
	room := s.room(t, true, alice)
	session := must(thief.NewSession(room))(t)
	s.share(t, thief, session, people.ForgeSelfSigningSignature(alice.SelfSigningKey()))
	s.judge(t, "forged confirmation", alice, must(thief.SendWith(ctx, session, say("trust me")))(t))

	session = must(thief.NewSession(room))(t)
	s.share(t, thief, session, people.DeviceKeysOf("@somebody:localhost"))
	s.judge(t, "somebody else's device", alice, must(thief.SendWith(ctx, session, say("I am somebody else")))(t))
}

func (s *differencesStage) playClearRoom(t *testing.T) {
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, false, alice)
	s.judge(t, "clear room", alice, must(alice.SendClear(within(t, patience), room, say("hello")))(t))
}

func (s *differencesStage) playVerified(t *testing.T) {
	ctx := within(t, 2*patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	before := must(alice.Send(ctx, room, say("you do not know me")))(t)
	must(alice.WaitForAnswer(ctx, before))(t)
	s.verify(t, alice, before)
	s.again(t, "verified since, earlier message", alice, before)
	s.judge(t, "verified since, old key", alice, must(alice.Send(ctx, room, say("now you do")))(t))
	alice.RotateSession(room)
	trusted := must(alice.Send(ctx, room, say("it is me")))(t)
	s.judge(t, "verified", alice, trusted)
	old := must(alice.CurrentSession(ctx, room))(t)

	second := s.w.login(t, alice.UserID.String(), people.Options{})
	s.learn(t, alice.UserID)
	session := must(second.NewSession(room))(t)
	s.share(t, second, session)
	s.judge(t, "verified, second device", alice, must(second.SendWith(ctx, session, say("a new phone")))(t))

	must(alice.ResetIdentity(ctx))(t)
	s.learn(t, alice.UserID)
	s.judge(t, "verified resets, old key", alice, must(alice.Send(ctx, room, say("still me?")))(t))
	s.again(t, "verified resets, earlier message", alice, trusted)
	alice.RotateSession(room)
	fresh := must(alice.Send(ctx, room, say("me, really")))(t)
	s.judge(t, "verified resets, fresh key", alice, fresh)

	s.verify(t, alice, fresh)
	s.judge(t, "verified again, old key", alice, must(alice.SendWith(ctx, old, say("with the key from before")))(t))
	s.judge(t, "verified again, key from between", alice, must(alice.Send(ctx, room, say("you have checked me again")))(t))
	alice.RotateSession(room)
	s.judge(t, "verified again, fresh key", alice, must(alice.Send(ctx, room, say("me for sure")))(t))
}

func (s *differencesStage) playReset(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	before := must(alice.Send(ctx, room, say("me")))(t)
	must(alice.WaitForAnswer(ctx, before))(t)
	must(alice.ResetIdentity(ctx))(t)
	s.learn(t, alice.UserID)
	s.judge(t, "stranger resets, old key", alice, must(alice.Send(ctx, room, say("me?")))(t))
	s.again(t, "stranger resets, earlier message", alice, before)
	alice.RotateSession(room)
	s.judge(t, "stranger resets, fresh key", alice, must(alice.Send(ctx, room, say("me!")))(t))
	if !must(s.element.NeedsApproval(ctx, alice.UserID))(t) {
		t.Error("the table says that Element tells the app of it")
	}
}

func (s *differencesStage) playNoIdentity(t *testing.T) {
	ctx := within(t, patience)
	bob := s.w.newPerson(t, "bob")
	room := s.room(t, true, bob)
	before := must(bob.Send(ctx, room, say("nobody vouches for me")))(t)
	s.judge(t, "no identity", bob, before)
	must(bob.BootstrapCrossSigning(ctx))(t)
	s.learn(t, bob.UserID)
	s.judge(t, "identity since, old key", bob, must(bob.Send(ctx, room, say("I do now")))(t))
	s.again(t, "identity since, earlier message", bob, before)
}

func (s *differencesStage) playSecondDevice(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	for _, device := range []struct {
		row       string
		options   people.Options
		forgeries []people.Forgery
	}{
		{"stranger, second device", people.Options{}, nil},
		{"unpublished device", people.Options{Unpublished: true}, nil},
		{"unpublished device, old app", people.Options{Unpublished: true}, []people.Forgery{people.OmitDeviceKeys()}},
	} {
		second := s.w.login(t, alice.UserID.String(), device.options)
		s.learn(t, alice.UserID)
		session := must(second.NewSession(room))(t)
		s.share(t, second, session, device.forgeries...)
		s.judge(t, device.row, alice, must(second.SendWith(ctx, session, say("whoever I am")))(t))
	}
}

func (s *differencesStage) playRotated(t *testing.T) {
	alice, room := s.playRotation(t, true)
	s.judge(t, "rotated, confirmed again", alice, must(alice.Send(within(t, patience), room, say("me, confirmed anew")))(t))
}

func (s *differencesStage) playRotatedAway(t *testing.T) {
	ctx := within(t, patience)
	alice, room := s.playRotation(t, false)
	s.judge(t, "rotated, old key", alice, must(alice.Send(ctx, room, say("the phone that was lost")))(t))
	alice.RotateSession(room)
	s.judge(t, "rotated, fresh key", alice, must(alice.Send(ctx, room, say("the phone that was lost")))(t))
}

// playRotation has somebody write, and then replace the self-signing key.
func (s *differencesStage) playRotation(t *testing.T, resign bool) (*people.Person, id.RoomID) {
	t.Helper()
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	must(alice.WaitForAnswer(ctx, must(alice.Send(ctx, room, say("me")))(t)))(t)
	ok(t, alice.RotateSelfSigningKey(ctx, resign))
	s.learn(t, alice.UserID)
	return alice, room
}

// playHistory has somebody who uses Element invite the three with the keys of what was said before (MSC4268).
func (s *differencesStage) playHistory(t *testing.T) {
	ctx := within(t, 2*patience)
	alice, _ := s.w.newStranger(t, "alice")
	inviter := s.w.newElement(t, "inviter")
	room, session := historyOf(t, alice, inviter)
	s.learn(t, alice.UserID)
	s.learn(t, inviter.UserID())
	for _, guest := range []id.UserID{s.bot.UserID, s.element.UserID(), s.stock.UserID} {
		ok(t, inviter.Invite(ctx, room, guest, true))
	}
	ok(t, s.element.JoinInvited(ctx, room))
	ok(t, s.stock.Join(ctx, room))
	ok(t, alice.WaitJoined(ctx, room, s.bot.UserID))
	s.judge(t, "key from the inviter", alice, must(alice.SendWith(ctx, session, say("can you read this?")))(t))
}

// playBackup has the three be new devices of one account, whose former device has left a key in the backup on the server.
func (s *differencesStage) playBackup(t *testing.T) {
	ctx := within(t, 2*patience)
	alice, _ := s.w.newStranger(t, "alice")
	account := s.w.newElement(t, "backedup")
	_, recoveryKey, err := account.SetUpRecovery(ctx, true)
	ok(t, err)
	_, session := sharedBefore(t, alice, account)
	waitForBackup(t, s.w, account, session)
	ok(t, account.Logout(ctx))
	devices := differencesStage{differencesTable: s.differencesTable, w: s.w}
	devices.bot = s.w.newBotOf(t, account.UserID(), recoveryKey)
	devices.element = s.w.newElementDevice(t, account.UserID().String())
	must(devices.element.UseRecovery(ctx, recoveryKey))(t)
	devices.stock = s.w.newStock(t, account.UserID().String())
	ok(t, devices.stock.RestoreBackup(ctx, recoveryKey))
	devices.learn(t, alice.UserID)
	devices.judge(t, "key from the backup", alice, must(alice.SendWith(ctx, session, say("can you read this?")))(t))
}

func (s *differencesStage) playUnreadable(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	withheld := must(alice.NewSession(room))(t)
	for _, to := range []id.UserID{s.bot.UserID, s.element.UserID(), s.stock.UserID} {
		ok(t, alice.Withhold(ctx, withheld, to, event.RoomKeyWithheldUnverified))
	}
	refused := must(alice.SendWith(ctx, withheld, say("for those whom I have verified")))(t)
	keyless, _, err := alice.SendWithoutKey(ctx, room, say("can you hear me?"))
	ok(t, err)
	session := must(alice.NewSession(room))(t)
	earlier := must(alice.Encrypt(session, "m.room.message", map[string]any{"msgtype": "m.text", "body": say("before you")}))(t)
	s.share(t, alice, session, people.Set(session.CurrentKey(), "content", "session_key"))
	tooEarly := must(alice.SendRaw(ctx, room, "m.room.encrypted", earlier))(t)
	s.judge(t, "withheld", alice, refused)
	s.judge(t, "no key", alice, keyless)
	s.judge(t, "key for later", alice, tooEarly)
}

func (s *differencesStage) playLateKey(t *testing.T) {
	ctx := within(t, patience)
	alice, _ := s.w.newStranger(t, "alice")
	room := s.room(t, true, alice)
	eventID, session, err := alice.SendWithoutKey(ctx, room, say("a moment"))
	ok(t, err)
	lateBy(t, 4*time.Second)
	s.share(t, alice, session)
	s.judge(t, "late key", alice, eventID)
}

// playLoggedOut has people come, say something and delete their device while all three are away.
func (s *differencesStage) playLoggedOut(t *testing.T) {
	ctx := within(t, 2*patience)
	host, _ := s.w.newStranger(t, "host")
	room := s.room(t, true, host)
	resume := sync.OnceFunc(s.pause(t))
	defer resume()
	signed, _ := s.w.newStranger(t, "signed")
	oldApp, _ := s.w.newStranger(t, "oldapp")
	unsigned := s.w.newPerson(t, "unsigned")
	sent := make(map[*people.Person]id.EventID)
	for _, guest := range []*people.Person{signed, oldApp, unsigned} {
		ok(t, host.Invite(ctx, room, guest.UserID))
		ok(t, guest.Join(ctx, room))
		session := must(guest.NewSession(room))(t)
		if guest == oldApp {
			s.share(t, guest, session, people.OmitDeviceKeys())
		} else {
			s.share(t, guest, session)
		}
		sent[guest] = must(guest.SendWith(ctx, session, say("I must go")))(t)
		ok(t, guest.Logout(ctx))
	}
	resume()
	for _, guest := range []*people.Person{signed, oldApp, unsigned} {
		s.learn(t, guest.UserID)
	}
	s.judge(t, "logged out", host, sent[signed])
	s.judge(t, "logged out, old app", host, sent[oldApp])
	s.judge(t, "logged out, not confirmed", host, sent[unsigned])
}

// playWithdrawn has two people who are pinned in the bot's configuration, one of whom resets, taken out of it. This takes a restart.
func (s *differencesStage) playWithdrawn(t *testing.T) {
	ctx := within(t, 2*patience)
	carol, dave := s.pinned[0], s.pinned[1]
	room := s.room(t, true, carol, dave)
	trusted := make(map[*people.Person]id.EventID)
	for _, person := range s.pinned {
		s.verify(t, person, must(person.Send(ctx, room, say("you know me")))(t))
		person.RotateSession(room)
		trusted[person] = must(person.Send(ctx, room, say("do you not?")))(t)
		must(person.WaitForAnswerThat(ctx, trusted[person], saying(cryptohook.CodeVerified)))(t)
	}
	old := must(dave.CurrentSession(ctx, room))(t)
	must(dave.ResetIdentity(ctx))(t)
	s.learn(t, dave.UserID)
	dave.RotateSession(room)
	violating := must(dave.Send(ctx, room, say("me, with new keys")))(t)
	must(dave.WaitForAnswerThat(ctx, violating, saying(cryptohook.CodeVerificationViolation)))(t)

	_, _, err := s.bot.Stop(ctx)
	ok(t, err)
	ok(t, s.bot.Reconfigure(func(config botproc.Config) { delete(config["trust"].(botproc.Config), "verified_users") }))
	ok(t, s.bot.Restart(ctx))
	ok(t, s.element.WithdrawVerification(ctx, carol.UserID))
	ok(t, s.element.WithdrawVerification(ctx, dave.UserID))
	s.judge(t, "withdrawn, old key", carol, must(carol.Send(ctx, room, say("why not any more?")))(t))
	s.again(t, "withdrawn, earlier message", carol, trusted[carol])
	carol.RotateSession(room)
	s.judge(t, "withdrawn, fresh key", carol, must(carol.Send(ctx, room, say("and now?")))(t))
	s.judge(t, "withdrawn after a reset, old key", dave, must(dave.SendWith(ctx, old, say("with the key from before")))(t))
	s.judge(t, "withdrawn after a reset, later key", dave, must(dave.Send(ctx, room, say("with the key from after")))(t))
	s.again(t, "withdrawn after a reset, earlier message", dave, violating)
}
