// A photo from the device's camera.

/**
 * Lets the camera button take photos.
 * @param {(id: string) => HTMLElement} find
 * @param {(photo: Blob, name: string) => void} take gets them.
 * @param {(text: string) => void} complain tells the user what is wrong.
 */
export function connectCamera(find, take, complain) {
  const [dialog, video] = [find("camera-dialog"), find("video")];
  let stream = null;

  find("camera").addEventListener("click", async () => {
    // Browsers give pages the camera on https and on localhost alone; phones then have their app.
    if (!navigator.mediaDevices) return find("shot").click();
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment", width: { ideal: 1920 } },
      });
    } catch (error) {
      const none = error.name === "NotFoundError";
      return complain(none ? "There is no camera here." : "The browser does not give the camera.");
    }
    video.srcObject = stream;
    dialog.showModal();
    await video.play();
  });

  find("snap").addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    dialog.close();
    take(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }), "photo.jpg");
  });

  find("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    stream?.getTracks().forEach((track) => track.stop());
    video.srcObject = stream = null;
  });
}
